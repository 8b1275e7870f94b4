"""Heads that predict boxes without a reference."""

from __future__ import annotations

from typing import Any

from dn_detr.modeling import DetectionHeads


class AbsoluteHeads(DetectionHeads):
    """One class head and one box head for all layers, which starts from random boxes.

    Args:
        num_classes, embed_dim, num_layers, **options: see `DetectionHeads`.
    """

    def __init__(
        self, num_classes: int, embed_dim: int = 256, num_layers: int = 6, **options: Any
    ) -> None:
        super().__init__(num_classes, embed_dim, num_layers, shared=True, **options)
        head: Any = self.bbox_embed[0]
        head.layers[-1].reset_parameters()  # zeros are for moves
