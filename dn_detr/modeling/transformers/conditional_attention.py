"""Attention that keeps content and position apart.

Meng et al., "Conditional DETR for Fast Training Convergence", 2021, section 3
(https://arxiv.org/abs/2108.06152), as Liu et al., "DAB-DETR", 2022, use it.
Legend: B batch, S cells of all levels, Q queries, L levels, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers import attend

from .levels import Memory


class ConditionalSelfAttention(nn.Module):
    """Queries and keys are sums of a projected content and a projected position.

    Args:
        embed_dim: C.
        num_heads: attention heads, a divisor of C.
        dropout: probability of dropping an attention weight.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content_proj = nn.Linear(embed_dim, embed_dim)
        self.query_pos_proj = nn.Linear(embed_dim, embed_dim)
        self.key_content_proj = nn.Linear(embed_dim, embed_dim)
        self.key_pos_proj = nn.Linear(embed_dim, embed_dim)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = _output_projection(embed_dim)

    def forward(
        self, x: Tensor, query_pos: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: (B, Q, C) content.
            query_pos: (B, Q, C) position.
            mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            (B, Q, C), and the projected queries (B, Q, C) of this attention.
        """
        query = self.query_content_proj(x) + self.query_pos_proj(query_pos)
        key = self.key_content_proj(x) + self.key_pos_proj(query_pos)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key, self.value_proj(x), self.num_heads, mask=mask, dropout=dropout)
        return self.out_proj(out), query


class ConditionalCrossAttention(nn.Module):
    """Every head compares content with content and position with position, side by side.

    With several levels each is attended to by itself, and a query weights the results (DN-DETR's
    "deformable encoder only" model).

    Args:
        embed_dim: C.
        num_heads: attention heads, a divisor of C.
        num_levels: L.
        adds_position: also add the projected positions to the contents, as the first decoder
            layer does, whose queries have no content of their own yet.
        dropout: probability of dropping an attention weight.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_levels: int = 1,
        adds_position: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content_proj = nn.Linear(embed_dim, embed_dim)
        self.query_pos_proj = nn.Linear(embed_dim, embed_dim) if adds_position else None
        self.query_pos_sine_proj = nn.Linear(embed_dim, embed_dim)
        self.key_content_proj = nn.Linear(embed_dim, embed_dim)
        self.key_pos_proj = nn.Linear(embed_dim, embed_dim)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.level_attn = nn.Linear(embed_dim, num_levels) if num_levels > 1 else None
        self.out_proj = _output_projection(embed_dim)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        query_sine: Tensor,
        memory: Memory,
        self_attn_query: Tensor,
    ) -> Tensor:
        """Attend to the memory.

        Args:
            x: (B, Q, C) content.
            query_pos: (B, Q, C) learned position.
            query_sine: (B, Q, C) sine embedding of the box centres, comparable to those of cells.
            memory: the encoded feature maps.
            self_attn_query: (B, Q, C) projected queries of the self-attention, used to weight the
                levels.

        Returns:
            (B, Q, C).
        """
        query, key = self.query_content_proj(x), self.key_content_proj(memory.cells)
        key_pos = self.key_pos_proj(memory.pos)
        if self.query_pos_proj is not None:
            query, key = query + self.query_pos_proj(query_pos), key + key_pos
        query = self._side_by_side(query, self.query_pos_sine_proj(query_sine))
        key = self._side_by_side(key, key_pos)
        value, padding = self.value_proj(memory.cells), memory.levels.attention_mask
        mask = None if padding is None else padding[:, None]
        if self.level_attn is None:
            return self.out_proj(self._attend(query, key, value, mask))
        sizes = memory.levels.sizes
        masks = [None] * len(sizes) if mask is None else mask.split(sizes, 2)
        parts = zip(key.split(sizes, 1), value.split(sizes, 1), masks, strict=True)
        per_level = torch.stack([self._attend(query, *part) for part in parts], dim=-1)
        weights = self.level_attn(self_attn_query).softmax(-1)  # (B, Q, L)
        return self.out_proj((per_level * weights[:, :, None]).sum(-1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, self.num_heads, mask=mask, dropout=dropout)

    def _side_by_side(self, content: Tensor, position: Tensor) -> Tensor:
        """Concatenate two (B, T, C) within each head; (B, T, 2 C)."""
        parts = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, position)]
        return torch.cat(parts, dim=-1).flatten(2)


def _output_projection(embed_dim: int) -> nn.Linear:
    projection = nn.Linear(embed_dim, embed_dim)
    nn.init.zeros_(projection.bias)
    return projection
