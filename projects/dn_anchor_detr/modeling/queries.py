"""Queries at learned points with learned patterns, and noised objects as such queries.

Wang et al., "Anchor DETR", 2022, sections 3.2 and 3.3 (https://arxiv.org/abs/2109.07107).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.modeling import AnchorQueries, BoxQueryEmbedding, PositionKind
from dn_detr.structures import valid_sizes


class CellCentres(nn.Module):
    """Where the cells of a map lie, relative to the unpadded image."""

    def forward(self, mask: Tensor) -> Tensor:
        """Padding (B, H, W), True = padding -> (B, 2, H, W) as (x, y) in (0, 1).

        Cells of the padding lie where the last cell of the image does, as published.
        """
        columns, rows = (~mask[:, 0]).cumsum(1) - 0.5, (~mask[:, :, 0]).cumsum(1) - 0.5
        x, y = columns[:, None].expand(mask.shape), rows[:, :, None].expand(mask.shape)
        return torch.stack([x, y], dim=1) / valid_sizes(mask)[:, :, None, None]


class PointQueries(AnchorQueries):
    """Every point with every pattern, pattern after pattern; see `AnchorQueries`."""

    def embed(self, labels: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """A noised object as a query: its centre, and the pattern of its group's number.

        Only the point is noised then, as the paper has it; it does not say what the content is.

        Args:
            labels: (M,) int64; without effect.
            boxes: (M, 4) as (cx, cy, w, h) in [0, 1].
            groups: (M,) int64.

        Source: Li et al., "DN-DETR", extended version, 2022, section 4.7.1
        (https://arxiv.org/abs/2203.01305).
        """
        if self.patterns is None:
            return boxes.new_zeros(len(boxes), self.embed_dim), boxes[:, :2]
        return self.patterns(groups % self.num_patterns), boxes[:, :2]


class PointQueryEmbedding(BoxQueryEmbedding):
    """Another content for noised objects: a learned row of the noised label, as in DN-DAB-DETR.

    Args:
        num_classes, embed_dim: see `BoxQueryEmbedding`.
    """

    position_kind: PositionKind = "point"

    def __init__(self, num_classes: int, embed_dim: int = 256) -> None:
        super().__init__(num_classes, embed_dim, indicator=False, no_object_label=False)

    def forward(self, labels: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `PointQueries.embed`."""
        return self.label_embed(labels), boxes[:, :2]
