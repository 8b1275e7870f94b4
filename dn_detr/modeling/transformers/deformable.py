"""The deformable transformer with boxes as queries (DAB- and DN-Deformable-DETR).

Zhu et al., "Deformable DETR", 2021 (https://arxiv.org/abs/2010.04159), with the dynamic anchor
boxes of Liu et al., "DAB-DETR", 2022 (https://arxiv.org/abs/2201.12329), as published with Li et
al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305).

Legend: B batch, S cells of all levels, Q queries (denoising queries first), L levels, C channels,
N decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP, FeedForward, MSDeformAttn, MultiheadAttention, sine_embed_boxes

from ..heads import DetectionHeads
from .levels import Levels


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
        attended = self.self_attn(
            x + pos,
            references,
            x,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.padding_mask,
        )
        return self.ffn(self.norm(x + self.dropout(attended)))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers.

    Args:
        num_layers: depth.
        **layer: arguments of ``DeformableEncoderLayer``.
    """

    def __init__(self, num_layers: int = 6, **layer: int | float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(**layer)  # type: ignore[arg-type]
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor, pos: Tensor, levels: Levels) -> Tensor:
        """(B, S, C) cells and (B, S, C) positions -> (B, S, C) memory."""
        references = levels.to_padded(levels.cell_centres())
        for layer in self.layers:
            x = layer(x, pos, references, levels)
        return x


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the feed-forward half.
        num_levels: L.
        num_points: sampling points per head and level.
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
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, dropout)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = MSDeformAttn(embed_dim, num_heads, num_levels, num_points)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        references: Tensor,
        memory: Tensor,
        levels: Levels,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            x: (B, Q, C) content.
            query_pos: (B, Q, C) position.
            references: (B, Q, L, 4) boxes relative to each padded map.
            memory: (B, S, C).
            levels: geometry of the memory.
            attention_mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            (B, Q, C).
        """
        positioned = x + query_pos
        attended = self.self_attn(positioned, positioned, x, mask=attention_mask)
        x = self.self_norm(x + self.dropout(attended))
        sampled = self.cross_attn(
            x + query_pos,
            references,
            memory,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.padding_mask,
        )
        return self.ffn(self.cross_norm(x + self.dropout(sampled)))


class DeformableDecoder(nn.Module):
    """Layers that move the queries' boxes: each predicts from the box that the one before left.

    Args:
        num_layers: N.
        embed_dim: C.
        padded_query_pos: embed the boxes relative to the finest *padded* map, as published. By
            default they are embedded relative to the image, so that a query does not depend on
            how much padding its batch adds; without padding both are the same.
        **layer: further arguments of ``DeformableDecoderLayer``.
    """

    def __init__(
        self,
        num_layers: int = 6,
        embed_dim: int = 256,
        *,
        padded_query_pos: bool = False,
        **layer: int | float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(embed_dim, **layer)  # type: ignore[arg-type]
            for _ in range(num_layers)
        )
        self.num_pos_feats = embed_dim // 2
        self.padded_query_pos = padded_query_pos
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2)

    def forward(
        self,
        queries: Tensor,
        anchors: Tensor,
        memory: Tensor,
        levels: Levels,
        heads: DetectionHeads,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            queries: (B, Q, C) content.
            anchors: (B, Q, 4) boxes (cx, cy, w, h) before the sigmoid.
            memory: (B, S, C).
            levels: geometry of the memory.
            heads: refine the boxes between the layers.
            attention_mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            states (N, B, Q, C) of all layers; references (N, B, Q, 4) in [0, 1], the box that each
            layer started from. Those of layers after the first carry no gradient.
        """
        x, reference = queries, anchors.sigmoid()
        states, references = [], []
        for index, layer in enumerate(self.layers):
            padded = levels.to_padded(reference)  # (B, Q, L, 4)
            embedded = padded[:, :, 0] if self.padded_query_pos else reference
            query_pos = self.ref_point_head(sine_embed_boxes(embedded, self.num_pos_feats))
            if index > 0:
                query_pos = query_pos * self.query_scale(x)
            x = layer(x, query_pos, padded, memory, levels, attention_mask)
            states.append(x)
            references.append(reference)
            if index + 1 < len(self.layers):
                reference = heads.predict_boxes(index, x, reference).detach()
        return torch.stack(states), torch.stack(references)


class DeformableTransformer(nn.Module):
    """Encoder and decoder over multi-level features.

    Args:
        encoder: ``DeformableEncoder`` or anything called like it.
        decoder: ``DeformableDecoder`` or anything called like it.
        embed_dim: C.
        num_levels: L.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, embed_dim: int = 256, num_levels: int = 4
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier everywhere, then deformable attention's own initialisation."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(
        self,
        maps: Sequence[Tensor],
        masks: Sequence[Tensor],
        positions: Sequence[Tensor],
        queries: Tensor,
        anchors: Tensor,
        heads: DetectionHeads,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode the maps and decode the queries.

        Args:
            maps: L maps (B, C, H_l, W_l).
            masks: L masks (B, H_l, W_l) bool, True = padding.
            positions: L position embeddings (B, C, H_l, W_l).
            queries: (B, Q, C).
            anchors: (B, Q, 4) boxes (cx, cy, w, h) before the sigmoid.
            heads: refine the boxes between the layers.
            attention_mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            states (N, B, Q, C) and references (N, B, Q, 4), see ``DeformableDecoder.forward``.
        """
        levels = Levels.from_masks(masks)
        cells = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        pos = torch.cat(
            [
                p.flatten(2).transpose(1, 2) + e
                for p, e in zip(positions, self.level_embed, strict=True)
            ],
            dim=1,
        )
        memory = self.encoder(cells, pos, levels)
        return self.decoder(queries, anchors, memory, levels, heads, attention_mask)
