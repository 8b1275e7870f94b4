"""The deformable encoder and decoder with boxes as queries (DAB- and DN-Deformable-DETR).

Zhu et al., "Deformable DETR", 2021 (https://arxiv.org/abs/2010.04159), with the dynamic anchor
boxes of Liu et al., "DAB-DETR", 2022 (https://arxiv.org/abs/2201.12329), as published with Li et
al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305).

Legend: B batch, S cells of all levels, Q queries (denoising queries first), L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dn_detr.layers import (
    FeedForward,
    MSDeformAttn,
    MultiheadAttention,
    run_checkpointed,
    sine_embed_boxes,
)

from .decoder import BoxDecoder, DecoderLayer
from .levels import Levels, Memory
from .stack import make_layers


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward half.
        num_levels: L.
        num_points: sampling points per head and level.
        dropout: probability after attention and in the feed-forward half.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim, num_heads, num_levels, num_points)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout)

    def forward(self, x: Tensor, pos: Tensor, references: Tensor, levels: Levels) -> Tensor:
        """(B, S, C) cells, (B, S, C) positions, (B, S, L, 2) references -> (B, S, C)."""
        self_attn_out = self.self_attn(
            x + pos,
            references,
            x,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.attention_mask,
        )
        return self.ffn(self.norm(x + self.dropout(self_attn_out)))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers.

    Args:
        layer: makes a `DeformableEncoderLayer` or a module called like it, see `make_layers`.
        num_layers: depth.

    Attributes:
        activation_checkpointing: see `run_checkpointed`; layer by layer.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module] = DeformableEncoderLayer,
        num_layers: int = 6,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.layers = make_layers(layer, num_layers)

    def forward(self, x: Tensor, pos: Tensor, levels: Levels) -> Tensor:
        """(B, S, C) cells and (B, S, C) positions -> (B, S, C) memory."""
        references = levels.to_padded(levels.cell_centres())
        for layer in self.layers:
            x = run_checkpointed(self, layer, x, pos, references, levels)
        return x


class DeformableDecoderLayer(DecoderLayer):
    """Self-attention among queries, deformable attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim, num_heads, feedforward_dim, num_levels, num_points: of
            `DeformableEncoderLayer`.
        dropout: probability after and inside attention, and in the feed-forward half.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            embed_dim,
            MultiheadAttention(embed_dim, num_heads, dropout),
            MSDeformAttn(embed_dim, num_heads, num_levels, num_points),
            feedforward_dim=feedforward_dim,
            dropout=dropout,
        )

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Memory,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x: (B, Q, C) content.
            query_pos: (B, Q, C) position.
            references: (B, Q, L, 2) points or (B, Q, L, 4) boxes relative to each padded map.
            memory: the encoded feature maps.
            mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            (B, Q, C).
        """
        x = self.attend_to_queries(x, query_pos, mask)
        levels = memory.levels
        cross_attn_out = self.cross_attn(
            x + query_pos,
            references,
            memory.cells,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.attention_mask,
        )
        return self.add_cross_attention(x, cross_attn_out)


class DeformableDecoder(BoxDecoder):
    """The decoder of DAB- and DN-Deformable-DETR; with other arguments that of DINO.

    Args:
        layer: makes a `DeformableDecoderLayer` or a module called like it, see `make_layers`.
        num_layers: depth.
        embed_dim: C.
        final_norm, look_forward_twice, query_scale: see `BoxDecoder`. The defaults are those of
            DAB- and DN-Deformable-DETR; DINO has the opposite of each.
        padded_query_pos: embed the boxes relative to the finest *padded* map, as published. By
            default they are embedded relative to the image, so that a query does not depend on
            how much padding its batch adds; without padding both are the same.
    """

    def __init__(
        self,
        layer: Callable[..., nn.Module] = DeformableDecoderLayer,
        num_layers: int = 6,
        embed_dim: int = 256,
        *,
        final_norm: bool = False,
        look_forward_twice: bool = False,
        query_scale: bool = True,
        padded_query_pos: bool = False,
    ) -> None:
        super().__init__(
            make_layers(layer, num_layers),
            embed_dim,
            final_norm=final_norm,
            look_forward_twice=look_forward_twice,
            query_scale=query_scale,
        )
        self.padded_query_pos = padded_query_pos

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`."""
        padded = memory.levels.to_padded(boxes)  # (B, Q, L, 4)
        embedded = padded[:, :, 0] if self.padded_query_pos else boxes
        query_pos = self.ref_point_head(sine_embed_boxes(embedded, self.num_pos_feats))
        query_pos = self.scale_position(index, query_pos, x)
        return self.layers[index](x, query_pos, padded, memory, mask)
