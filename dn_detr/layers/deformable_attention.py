"""Multi-scale deformable attention.

Zhu et al., "Deformable DETR", 2021, section 4.1 (https://arxiv.org/abs/2010.04159).
Legend: B batch, S cells of all levels, H heads, Q queries, L levels, P points, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dn_detr.ops import ms_deform_attn_fused

from .linear import Linear


class MSDeformAttn(nn.Module):
    """Each query looks at P points of each level and head, at offsets that it predicts.

    Args:
        embed_dim: channels C of queries and values.
        num_heads: H, a divisor of `embed_dim`.
        num_levels: L feature levels.
        num_points: P sampling points per head and level.

    Raises:
        ValueError: a number below 1, or `embed_dim` is not divisible by `num_heads`.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ) -> None:
        super().__init__()
        if min(embed_dim, num_heads, num_levels, num_points) < 1:
            raise ValueError(
                f"embed_dim {embed_dim}, num_heads {num_heads}, num_levels {num_levels} and "
                f"num_points {num_points} must be positive"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(embed_dim, samples * 2)
        self.attention_weights = Linear(embed_dim, samples)
        self.value_proj = Linear(embed_dim, embed_dim)
        self.output_proj = Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head h looks into direction h; point p lies p + 1 cells away; all weights are equal."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (H, 2) on the unit square
        distance = torch.arange(1, self.num_points + 1)
        grid = direction[:, None, None, :] * distance[None, None, :, None]  # (H, 1, P, 2)
        grid = grid.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(grid.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C) content plus position.
            reference_points: (B, Q, L, 2) points (x, y), or (B, Q, L, 4) boxes (cx, cy, w, h), in
                [0, 1] of each level's padded map. Offsets count cells from a point, and half
                box sizes (divided by P) from a box's centre.
            memory: (B, S, C) features of all levels.
            spatial_shapes: (L, 2) int64 heights and widths.
            level_start_index: (L,) int64.
            padding_mask: (B, S) bool, True = padding: such cells read as zeros.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: see `ms_deform_attn_fused`.
        """
        samples = (self.num_heads, self.num_levels, self.num_points)
        out = ms_deform_attn_fused(
            self.value_proj(memory).unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            level_start_index,
            reference_points,
            self.sampling_offsets(query).unflatten(-1, (*samples, 2)),
            self.attention_weights(query).unflatten(-1, (self.num_heads, -1)),
            padding_mask,
        )
        return self.output_proj(out)
