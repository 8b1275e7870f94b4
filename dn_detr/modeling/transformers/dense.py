"""The dense encoder and decoder with boxes as queries (DAB-DETR, DN-DETR).

Carion et al., "End-to-End Object Detection with Transformers", 2020, with the conditional
attention of Meng et al., "Conditional DETR", 2021, and the width- and height-modulated attention
of Liu et al., "DAB-DETR", 2022, section 4.4 (https://arxiv.org/abs/2201.12329).

Legend: B batch, S cells of all levels, Q queries (denoising queries first), L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dn_detr.layers import (
    MLP,
    FeedForward,
    MultiheadAttention,
    run_checkpointed,
    sine_embed_boxes,
)
from dn_detr.structures import at_least_float32

from .conditional_attention import ConditionalCrossAttention, ConditionalSelfAttention
from .decoder import BoxDecoder, DecoderLayer
from .levels import Levels, Memory
from .stack import make_layers


class DenseEncoderLayer(nn.Module):
    """Self-attention of all cells, then feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward half.
        dropout: probability after and inside attention, and in the feed-forward half.
        activation: of the feed-forward half, see `FeedForward`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        *,
        feedforward_dim: int = 2048,
        activation: str = "prelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout, activation)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, C) cells, (B, S, C) positions, (B, 1, S) bool, True = blocked -> (B, S, C)."""
        positioned = x + pos
        self_attn_out = self.self_attn(positioned, positioned, x, mask=mask)
        return self.ffn(self.norm(x + self.dropout(self_attn_out)))


class DenseEncoder(nn.Module):
    """A stack of encoder layers.

    Args:
        layer: makes a `DenseEncoderLayer` or a module called like it, see `make_layers`.
        num_layers: depth.
        embed_dim: C.
        query_scale: scale the positions by the contents; DETR does not.

    Attributes:
        activation_checkpointing: see `run_checkpointed`; layer by layer.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module] = DenseEncoderLayer,
        num_layers: int = 6,
        embed_dim: int = 256,
        *,
        query_scale: bool = True,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.layers = make_layers(layer, num_layers)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if query_scale else None

    def forward(self, x: Tensor, pos: Tensor, levels: Levels) -> Tensor:
        """(B, S, C) cells and (B, S, C) positions -> (B, S, C) memory."""
        padding = levels.attention_mask
        mask = None if padding is None else padding[:, None]
        for layer in self.layers:
            x = run_checkpointed(self, self._update, layer, x, pos, mask)
        return x

    def _update(self, layer: nn.Module, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        if self.query_scale is not None:
            pos = pos * self.query_scale(x)
        updated: Tensor = layer(x, pos, mask)
        return updated


class DenseDecoderLayer(DecoderLayer):
    """Conditional self-attention, conditional attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim, num_heads, feedforward_dim, dropout, activation: see `DenseEncoderLayer`.
        num_levels: L.
        is_first: whether this is the decoder's first layer, whose cross-attention adds the
            positions to the contents, see `ConditionalCrossAttention`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        *,
        num_levels: int = 1,
        feedforward_dim: int = 2048,
        activation: str = "prelu",
        dropout: float = 0.0,
        is_first: bool = False,
    ) -> None:
        super().__init__(
            embed_dim,
            ConditionalSelfAttention(embed_dim, num_heads, dropout),
            ConditionalCrossAttention(
                embed_dim, num_heads, num_levels=num_levels, adds_position=is_first, dropout=dropout
            ),
            feedforward_dim=feedforward_dim,
            dropout=dropout,
            activation=activation,
        )

    def forward(
        self, x: Tensor, query_pos: Tensor, query_sine: Tensor, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """Update the queries.

        Args:
            x: (B, Q, C) content.
            query_pos: (B, Q, C) learned position.
            query_sine: (B, Q, C) sine embedding of the box centres.
            memory: the encoded feature maps.
            mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            (B, Q, C).
        """
        self_attn_out, self_attn_query = self.self_attn(x, query_pos, mask)
        x = self.add_self_attention(x, self_attn_out)
        cross_attn_out = self.cross_attn(x, query_pos, query_sine, memory, self_attn_query)
        return self.add_cross_attention(x, cross_attn_out)


class DenseDecoder(BoxDecoder):
    """The decoder of DAB-DETR and DN-DETR, over one level or several.

    Args:
        layer: makes a `DenseDecoderLayer` or a module called like it, see `make_layers`; the
            first one with `is_first=True`.
        num_layers: depth.
        embed_dim: C.
        final_norm, look_forward_twice, query_scale: see `BoxDecoder`. The published models have
            all three.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module] = DenseDecoderLayer,
        num_layers: int = 6,
        embed_dim: int = 256,
        *,
        final_norm: bool = True,
        look_forward_twice: bool = True,
        query_scale: bool = True,
    ) -> None:
        super().__init__(
            make_layers(layer, num_layers, is_first=True),
            embed_dim,
            final_norm=final_norm,
            look_forward_twice=look_forward_twice,
            query_scale=query_scale,
        )
        self.ref_anchor_head = MLP(embed_dim, embed_dim, 2, 2)

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`."""
        embedded = sine_embed_boxes(boxes, self.num_pos_feats)  # (B, Q, 2 C): y, x, w, h
        query_pos = self.ref_point_head(embedded)
        query_sine = embedded[..., : x.shape[-1]] * self._modulation(x, boxes)
        query_sine = self.scale_position(index, query_sine, x)
        return self.layers[index](x, query_pos, query_sine, memory, mask)

    def _modulation(self, x: Tensor, reference: Tensor) -> Tensor:
        """Factors (B, Q, C) of the sine embedding of the centres, y half before x half.

        Attention with them is as wide and high as the content wants, not as the box is.
        """
        size = at_least_float32(self.ref_anchor_head(x)).sigmoid()
        ratio_hw = (size / reference[..., 2:]).flip(-1)
        return ratio_hw.repeat_interleave(self.num_pos_feats, dim=-1)
