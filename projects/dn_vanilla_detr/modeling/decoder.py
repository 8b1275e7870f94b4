"""DETR's decoder: the position of a query is a vector that stays.

Carion et al., "DETR", 2020, appendix A.3 (https://arxiv.org/abs/2005.12872).
Legend: B batch, Q queries (denoising queries first), C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dn_detr.layers import MultiheadAttention
from dn_detr.modeling import Decoder, Memory
from dn_detr.modeling.transformers import DecoderLayer
from dn_detr.modeling.transformers.stack import make_layers


class VectorDecoderLayer(DecoderLayer):
    """Self-attention of the queries, attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward half.
        dropout: probability after and inside attention, and in the feed-forward half.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, *, feedforward_dim: int, dropout: float
    ) -> None:
        super().__init__(
            embed_dim,
            MultiheadAttention(embed_dim, num_heads, dropout),
            MultiheadAttention(embed_dim, num_heads, dropout),
            feedforward_dim=feedforward_dim,
            dropout=dropout,
        )

    def forward(self, x: Tensor, position: Tensor, memory: Memory, mask: Tensor | None) -> Tensor:
        """Contents and positions (B, Q, C), mask (B, Q, Q) bool, True = blocked -> (B, Q, C)."""
        x = self.attend_to_queries(x, position, mask)
        cells, padding = memory.cells, memory.levels.attention_mask
        seen = None if padding is None else padding[:, None]
        found = self.cross_attn(x + position, cells + memory.pos, cells, mask=seen)
        return self.add_cross_attention(x, found)


class VectorDecoder(Decoder):
    """A stack of decoder layers, and one norm of what they give to the heads.

    Args:
        layer: makes a `VectorDecoderLayer` or a module called like it, see `make_layers`.
        num_layers: how many.
        embed_dim: C.
    """

    def __init__(
        self, layer: Callable[..., nn.Module], num_layers: int = 6, embed_dim: int = 256
    ) -> None:
        super().__init__(make_layers(layer, num_layers))
        self.norm = nn.LayerNorm(embed_dim)

    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See `Decoder.start`; a reference of 0.5 adds nothing to what the heads predict."""
        return content, content.new_full((*content.shape[:2], 4), 0.5), position

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`."""
        updated: Tensor = self.layers[index](x, pos, memory, mask)
        return updated
