"""Heads that move a point and give it a size."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dn_detr.modeling import DetectionHeads
from dn_detr.structures import at_least_float32, inverse_sigmoid


class PointHeads(DetectionHeads):
    """One class head and one box head for all layers; the point moves the centre only.

    Args:
        num_classes, embed_dim, num_layers, **options: see `DetectionHeads`.
    """

    def __init__(
        self, num_classes: int, embed_dim: int = 256, num_layers: int = 6, **options: Any
    ) -> None:
        super().__init__(num_classes, embed_dim, num_layers, shared=True, **options)

    def predict_boxes(self, layer: int, states: Tensor, references: Tensor) -> Tensor:
        """(..., C) states at (..., 2) points -> (..., 4) boxes in [0, 1]."""
        moves = at_least_float32(self.bbox_embed[0](states))
        return (moves + F.pad(inverse_sigmoid(references, self.eps), (0, 2))).sigmoid()
