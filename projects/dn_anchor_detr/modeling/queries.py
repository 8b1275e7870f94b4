"""Queries at learned points with learned patterns, and noised objects as such queries.

Wang et al., "Anchor DETR", 2022, sections 3.2 and 3.3 (https://arxiv.org/abs/2109.07107).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.modeling import Memory, PositionKind, Queries
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


class PointQueries(nn.Module):
    """Every point with every pattern, pattern after pattern.

    Args:
        num_queries: number of points A.
        embed_dim: C.
        num_patterns: P; the decoder has A * P queries.
    """

    position_kind: PositionKind = "point"

    def __init__(self, num_queries: int = 300, embed_dim: int = 256, num_patterns: int = 3) -> None:
        super().__init__()
        if num_queries < 1 or num_patterns < 1:
            raise ValueError(
                f"num_queries {num_queries} and num_patterns {num_patterns} must be at least 1"
            )
        self.num_queries = num_queries
        self.num_patterns = num_patterns
        self.points = nn.Embedding(num_queries, 2)
        self.patterns = nn.Embedding(num_patterns, embed_dim)
        nn.init.uniform_(self.points.weight)

    def forward(self, memory: Memory) -> Queries:
        """Content (B, Q, C) and position (B, Q, 2) of the queries of a batch."""
        batch = len(memory.cells)
        content = self.patterns.weight.repeat_interleave(self.num_queries, 0)
        position = self.points.weight.repeat(self.num_patterns, 1)
        return Queries(content.expand(batch, -1, -1), position.expand(batch, -1, -1))

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
        return self.patterns(groups % self.num_patterns), boxes[:, :2]


class PointQueryEmbedding(nn.Module):
    """Another content for noised objects: a learned row of the noised label, as in DN-DAB-DETR.

    Args:
        num_classes: K.
        embed_dim: C.
    """

    position_kind: PositionKind = "point"

    def __init__(self, num_classes: int, embed_dim: int = 256) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_embed = nn.Embedding(num_classes, embed_dim)

    def forward(self, labels: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `PointQueries.embed`."""
        return self.label_embed(labels), boxes[:, :2]

    def class_tensors(self) -> list[str]:
        """Names of the tensors that have a row per class."""
        return ["label_embed.weight"]
