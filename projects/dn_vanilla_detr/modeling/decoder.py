"""DETR's decoder: the position of a query is a vector that stays.

Carion et al., "DETR", 2020, appendix A.3 (https://arxiv.org/abs/2005.12872).
Legend: B batch, Q queries (denoising queries first), C channels, N layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dn_detr.layers import FeedForward, MultiheadAttention, run_checkpointed
from dn_detr.modeling import DetectionHeads, Memory, PositionKind
from dn_detr.modeling.transformers.stack import make_layers


class VectorDecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward half.
        dropout: probability after and inside attention, and in the feed-forward half.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        *,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, dropout)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = MultiheadAttention(embed_dim, num_heads, dropout)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:
        """Update the queries (B, Q, C).

        Args:
            x: (B, Q, C) content.
            position: (B, Q, C).
            memory: the encoded feature maps.
            mask: (B, Q, Q) bool, True = blocked.
        """
        located = x + position
        x = self.self_norm(x + self.dropout(self.self_attn(located, located, x, mask=mask)))
        cells, padding = memory.cells, memory.levels.attention_mask
        seen = None if padding is None else padding[:, None]
        found = self.cross_attn(x + position, cells + memory.pos, cells, mask=seen)
        return self.ffn(self.cross_norm(x + self.dropout(found)))


class VectorDecoder(nn.Module):
    """A stack of decoder layers, and one norm of what they give to the heads.

    Args:
        layer: makes a `VectorDecoderLayer` or a module called like it, see `make_layers`.
        num_layers: N.
        embed_dim: C.

    Attributes:
        activation_checkpointing: see `run_checkpointed`; layer by layer.
    """

    position_kind: PositionKind = "vector"

    def __init__(
        self, layer: Callable[..., nn.Module], num_layers: int = 6, embed_dim: int = 256
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.layers = make_layers(layer, num_layers)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        memory: Memory,
        heads: DetectionHeads,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States (N, B, Q, C) of all layers, and the positions, one and the same for each layer."""
        x, states = content, []
        for layer in self.layers:
            x = run_checkpointed(self, layer, x, position, memory, attention_mask)
            states.append(self.norm(x))
        return torch.stack(states), position.expand(len(states), -1, -1, -1)
