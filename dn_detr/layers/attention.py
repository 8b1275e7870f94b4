"""Multi-head attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention of projected tensors whose channels are heads, one by one.

    Args:
        query: (B, Q, C).
        key: (B, K, C).
        value: (B, K, D).
        num_heads: heads, a divisor of C and D.
        mask: (Q, K) or (B, Q or 1, K) bool, True = blocked (the convention of
            `nn.MultiheadAttention`), or None. Every query must see some key.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, Q, D).

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    allowed = None if mask is None else ~mask
    if allowed is not None and allowed.ndim == 3:
        allowed = allowed[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a mask for each image.

    Parameters and initialisation are the parent's. The parent wants a per-image mask repeated for
    every head (and turns it into floats in every layer); this one broadcasts it.

    Args:
        embed_dim: channels of queries, keys and values.
        num_heads: number of heads, a divisor of `embed_dim`.
        dropout: probability of dropping an attention weight.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__(embed_dim, num_heads, dropout=dropout, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C).
            key: (B, K, C).
            value: (B, K, C).
            mask: see `attend`.

        Returns:
            (B, Q, C).
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(q, k, v, self.num_heads, mask=mask, dropout=dropout))
