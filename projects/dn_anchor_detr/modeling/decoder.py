"""Anchor DETR's decoder: every layer looks from the same points.

Wang et al., "Anchor DETR", 2022 (https://arxiv.org/abs/2109.07107).
Legend: B batch, Q queries (denoising queries first), C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi
from typing import Any

from torch import Tensor, nn

from dn_detr.layers import MLP, MultiheadAttention, sine_embed, sine_embed_boxes
from dn_detr.modeling import Decoder, Memory, PositionKind, Transformer
from dn_detr.modeling.transformers import DecoderLayer, boxes_of_points
from dn_detr.modeling.transformers.stack import make_layers

from .attention import RowColumnAttention


class PointDecoderLayer(DecoderLayer):
    """Self-attention of the queries, attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim, num_heads, feedforward_dim, mask_padding: see `RowColumnEncoderLayer`.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, *, feedforward_dim: int, mask_padding: bool
    ) -> None:
        super().__init__(
            embed_dim,
            MultiheadAttention(embed_dim, num_heads),
            RowColumnAttention(embed_dim, num_heads, mask_padding=mask_padding),
            feedforward_dim=feedforward_dim,
        )

    def forward(
        self, x: Tensor, pos: Tensor, axis_pos: Tensor, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """Update the queries (B, Q, C).

        Args:
            x: (B, Q, C) content.
            pos: (B, Q, C) of the points.
            axis_pos: (B, Q, 2 C) of the x and of the y of the points.
            memory: the encoded feature map.
            mask: (B, Q, Q) bool, True = blocked.
        """
        x = self.attend_to_queries(x, pos, mask)
        found = self.cross_attn(x, axis_pos, memory.cells, memory.pos, memory.levels)
        return self.add_cross_attention(x, found)


class PointDecoder(Decoder):
    """A stack of decoder layers.

    Args:
        layer: makes a `PointDecoderLayer` or a module called like it, see `make_layers`.
        num_layers: how many.
        embed_dim: C.
    """

    position_kind: PositionKind = "point"

    def __init__(
        self, layer: Callable[..., nn.Module], num_layers: int = 6, embed_dim: int = 256
    ) -> None:
        super().__init__(make_layers(layer, num_layers))
        self.embed_dim = embed_dim
        self.adapt_pos1d = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.adapt_pos2d = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.norm = nn.Identity()

    def embed_axes(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y) -> (..., 2 C), of the x and of the y."""
        sines = sine_embed(points * (2 * pi), self.embed_dim)
        return self.adapt_pos1d(sines.to(points)).flatten(-2)

    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See `Decoder.start`."""
        pos = self.adapt_pos2d(sine_embed_boxes(position, self.embed_dim // 2).to(content))
        return content, boxes_of_points(position), (pos, self.embed_axes(position))

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`."""
        updated: Tensor = self.layers[index](x, *pos, memory, mask)
        return updated


class PointTransformer(Transformer):
    """Encoder and `PointDecoder`, which embeds the centres of the cells as it does the queries'."""

    decoder: PointDecoder

    def reset_parameters(self) -> None:
        """Leave every module as it starts."""

    def encode(
        self, maps: Sequence[Tensor], masks: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> Memory:
        """See `Transformer.encode`; positions are (B, 2, H, W), see `CellCentres`."""
        dtype = next(self.parameters()).dtype
        embedded = [
            self.decoder.embed_axes(p.permute(0, 2, 3, 1).to(dtype)).permute(0, 3, 1, 2)
            for p in positions
        ]
        return super().encode(maps, masks, embedded)
