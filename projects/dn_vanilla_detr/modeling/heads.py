"""Heads that predict boxes without a reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dn_detr.modeling import DetectionHeads
from dn_detr.structures import at_least_float32


class AbsoluteHeads(DetectionHeads):
    """One class head and one box head for all layers; a box is what the head says.

    Args:
        num_classes, embed_dim, num_layers, **options: see `DetectionHeads`.
    """

    def __init__(
        self, num_classes: int, embed_dim: int = 256, num_layers: int = 6, **options: Any
    ) -> None:
        super().__init__(num_classes, embed_dim, num_layers, shared=True, **options)
        head: Any = self.bbox_embed[0]
        head.layers[-1].reset_parameters()  # zeros are for moves

    def predict_boxes(self, layer: int, states: Tensor, references: Tensor) -> Tensor:
        """(..., C) states -> (..., 4) boxes in [0, 1]; `references` are without effect."""
        return at_least_float32(self.bbox_embed[0](states)).sigmoid()
