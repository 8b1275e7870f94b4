"""Row-column decoupled attention: over the columns of a map, then over its rows.

Wang et al., "Anchor DETR", 2022, section 3.4 (https://arxiv.org/abs/2109.07107).
Legend: B batch, Q queries, H and W of the map, S = H * W cells, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers import FeedForward
from dn_detr.modeling.transformers import Levels


class RowColumnAttention(nn.Module):
    """Attention whose weight of a cell is that of its column times that of its row.

    Args:
        embed_dim: C.
        num_heads: a divisor of C.
        mask_padding: average the keys of a column or row over the cells of the image alone. False
            is the published behaviour: the result for an image then depends on how much padding
            its batch adds.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, *, mask_padding: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mask_padding = mask_padding
        self.in_proj_weight = nn.Parameter(torch.empty(5 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(5 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        cells: Tensor,
        cell_pos: Tensor,
        levels: Levels,
    ) -> Tensor:
        """Attend to the cells of one map.

        Args:
            query: (B, Q, C).
            query_pos: (B, Q, 2 C), of the x and of the y of each query.
            cells: (B, S, C).
            cell_pos: (B, S, 2 C), of the x and of the y of each cell.
            levels: of the one map.

        Returns:
            (B, Q, C).
        """
        ((height, width),) = levels.spatial_shapes.tolist()
        padding = levels.padding_mask.unflatten(1, (height, width))
        query_x, query_y = (query + pos for pos in query_pos.chunk(2, -1))
        key_x, key_y = (
            (cells + pos).unflatten(1, (height, width)) for pos in cell_pos.chunk(2, -1)
        )
        counted = torch.ones_like(padding) if not self.mask_padding else ~padding
        key_x, key_y = (_mean(key, counted, dim) for dim, key in ((1, key_x), (2, key_y)))
        inputs = (query_x, query_y, key_x, key_y, cells)
        projections = zip(self.in_proj_weight.chunk(5), self.in_proj_bias.chunk(5), strict=True)
        q_x, q_y, k_x, k_y, value = (
            F.linear(x, *projection).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, projection in zip(inputs, projections, strict=True)
        )
        of_columns = _weights(q_x, k_x, padding[:, 0])  # (B, heads, Q, W)
        of_rows = _weights(q_y, k_y, padding[:, :, 0])  # (B, heads, Q, H)
        value = value.unflatten(2, (height, width))
        columns = torch.einsum("bnqx,bnyxd->bnqyd", of_columns, value)
        found = torch.einsum("bnqy,bnqyd->bnqd", of_rows, columns)
        return self.out_proj(found.transpose(1, 2).flatten(2))


def _mean(cells: Tensor, counted: Tensor, dim: int) -> Tensor:
    """Mean over one axis of (B, H, W, C) of the cells that (B, H, W) counts."""
    total = (cells * counted[..., None]).sum(dim)
    return total / counted.sum(dim).clamp(min=1)[..., None]


def _weights(query: Tensor, key: Tensor, padding: Tensor) -> Tensor:
    """Queries (B, heads, Q, D), keys (B, heads, K, D), padding (B, K) -> (B, heads, Q, K)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)


class RowColumnEncoderLayer(nn.Module):
    """Self-attention of the cells of one map, then feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward half.
        mask_padding: see `RowColumnAttention`.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, *, feedforward_dim: int, mask_padding: bool
    ) -> None:
        super().__init__()
        self.self_attn = RowColumnAttention(embed_dim, num_heads, mask_padding=mask_padding)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim)

    def forward(self, x: Tensor, pos: Tensor, references: Tensor, levels: Levels) -> Tensor:
        """(B, S, C) cells at (B, S, 2 C) positions -> (B, S, C); `references` are not used."""
        return self.ffn(self.norm(x + self.self_attn(x, pos, x, pos, levels)))
