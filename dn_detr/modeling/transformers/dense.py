"""The dense encoder and decoder with boxes as queries (DAB-DETR, DN-DETR).

Carion et al., "End-to-End Object Detection with Transformers", 2020, with the conditional
attention of Meng et al., "Conditional DETR", 2021, and the width- and height-modulated attention
of Liu et al., "DAB-DETR", 2022, section 4.4 (https://arxiv.org/abs/2201.12329).

Legend: B batch, S cells of all levels, Q queries (denoising queries first), L levels, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dn_detr.layers import MLP, FeedForward, MultiheadAttention, run_part, sine_embed_boxes
from dn_detr.structures import at_least_float32

from .conditional_attention import ConditionalCrossAttention, ConditionalSelfAttention
from .decoder import BoxDecoder
from .levels import Levels, Memory


class DenseEncoderLayer(nn.Module):
    """Self-attention of all cells, then feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        dropout: probability after and inside attention, and in the feed-forward half.
        **ffn: further arguments of ``FeedForward``: ``feedforward_dim``, ``activation``.
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 8, *, dropout: float = 0.0, **ffn: Any
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, dropout=dropout, **ffn)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, C) cells, (B, S, C) positions, (B, 1, S) bool, True = blocked -> (B, S, C)."""
        positioned = x + pos
        attended = self.self_attn(positioned, positioned, x, mask=mask)
        return self.ffn(self.norm(x + self.dropout(attended)))


class DenseEncoder(nn.Module):
    """A stack of encoder layers whose positions are scaled by the content.

    Args:
        num_layers: depth.
        embed_dim: C.
        **layer: further arguments of ``DenseEncoderLayer``.

    Attributes:
        recompute_activations: forget them in training, layer by layer, see ``run_part``.
    """

    def __init__(self, num_layers: int = 6, embed_dim: int = 256, **layer: Any) -> None:
        super().__init__()
        self.recompute_activations = False
        self.layers = nn.ModuleList(
            DenseEncoderLayer(embed_dim, **layer) for _ in range(num_layers)
        )
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2)

    def forward(self, x: Tensor, pos: Tensor, levels: Levels) -> Tensor:
        """(B, S, C) cells and (B, S, C) positions -> (B, S, C) memory."""
        padding = levels.attention_mask
        mask = None if padding is None else padding[:, None]
        for layer in self.layers:
            x = run_part(self, self._update, layer, x, pos, mask)
        return x

    def _update(self, layer: nn.Module, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        updated: Tensor = layer(x, pos * self.query_scale(x), mask)
        return updated


class DenseDecoderLayer(nn.Module):
    """Conditional self-attention, conditional attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim, num_heads, dropout, **ffn: of ``DenseEncoderLayer``.
        num_levels: L.
        is_first: whether this layer starts the decoder, see ``ConditionalCrossAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        *,
        num_levels: int = 1,
        dropout: float = 0.0,
        is_first: bool = False,
        **ffn: Any,
    ) -> None:
        super().__init__()
        self.self_attn = ConditionalSelfAttention(embed_dim, num_heads, dropout)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = ConditionalCrossAttention(
            embed_dim, num_heads, num_levels=num_levels, adds_position=is_first, dropout=dropout
        )
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, dropout=dropout, **ffn)
        self.dropout = nn.Dropout(dropout)

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
        attended, asked = self.self_attn(x, query_pos, mask)
        x = self.self_norm(x + self.dropout(attended))
        found = self.cross_attn(x, query_pos, query_sine, memory, asked)
        return self.ffn(self.cross_norm(x + self.dropout(found)))


class DenseDecoder(BoxDecoder):
    """The decoder of DAB-DETR and DN-DETR, over one level or several.

    Args:
        num_layers: depth.
        embed_dim: C.
        **layer: further arguments of ``DenseDecoderLayer``.
    """

    def __init__(self, num_layers: int = 6, embed_dim: int = 256, **layer: Any) -> None:
        layers = [
            DenseDecoderLayer(embed_dim, is_first=index == 0, **layer)
            for index in range(num_layers)
        ]
        super().__init__(layers, embed_dim, final_norm=True, look_forward_twice=True)
        self.ref_anchor_head = MLP(embed_dim, embed_dim, 2, 2)

    def update(
        self, index: int, x: Tensor, reference: Tensor, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See ``BoxDecoder.update``."""
        embedded = sine_embed_boxes(reference, self.num_pos_feats)  # (B, Q, 2 C): y, x, w, h
        query_pos = self.ref_point_head(embedded)
        query_sine = embedded[..., : x.shape[-1]] * self._modulation(x, reference)
        if index > 0:
            query_sine = query_sine * self.query_scale(x)
        return self.layers[index](x, query_pos, query_sine, memory, mask)

    def _modulation(self, x: Tensor, reference: Tensor) -> Tensor:
        """How much wider and higher than its box a query looks; (B, Q, C), y half before x half."""
        wanted = at_least_float32(self.ref_anchor_head(x)).sigmoid()
        ratio_hw = (wanted / reference[..., 2:]).flip(-1)
        return ratio_hw.repeat_interleave(self.num_pos_feats, dim=-1)
