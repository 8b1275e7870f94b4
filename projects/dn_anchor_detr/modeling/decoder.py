"""Anchor DETR's decoder: every layer looks from the same points.

Wang et al., "Anchor DETR", 2022 (https://arxiv.org/abs/2109.07107).
Legend: B batch, Q queries (denoising queries first), C channels, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP, FeedForward, MultiheadAttention, run_checkpointed, sine_embed
from dn_detr.modeling import DetectionHeads, Memory, PositionKind, Transformer
from dn_detr.modeling.transformers.stack import make_layers

from .attention import RowColumnAttention


class PointDecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, feed-forward; post-norm.

    Args:
        embed_dim, num_heads, feedforward_dim, mask_padding: see `RowColumnEncoderLayer`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        *,
        feedforward_dim: int = 1024,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads)
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = RowColumnAttention(embed_dim, num_heads, mask_padding=mask_padding)
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim)

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
        located = x + pos
        x = self.self_norm(x + self.self_attn(located, located, x, mask=mask))
        found = self.cross_attn(x, axis_pos, memory.cells, memory.pos, memory.levels)
        return self.ffn(self.cross_norm(x + found))


class PointDecoder(nn.Module):
    """A stack of decoder layers.

    Args:
        layer: makes a `PointDecoderLayer` or a module called like it, see `make_layers`.
        num_layers: N.
        embed_dim: C.

    Attributes:
        activation_checkpointing: see `run_checkpointed`; layer by layer.
    """

    position_kind: PositionKind = "point"

    def __init__(
        self, layer: Callable[..., nn.Module], num_layers: int = 6, embed_dim: int = 256
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.embed_dim = embed_dim
        self.layers = make_layers(layer, num_layers)
        self.adapt_pos1d = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.adapt_pos2d = MLP(embed_dim, embed_dim, embed_dim, 2)

    def embed_axes(self, points: Tensor) -> Tensor:
        """(..., 2) points (x, y) -> (..., 2 C), of the x and of the y."""
        sines = sine_embed(points * (2 * pi), self.embed_dim)
        return self.adapt_pos1d(sines.to(points)).flatten(-2)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        memory: Memory,
        heads: DetectionHeads,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States (N, B, Q, C) of all layers, and the points (N, B, Q, 2), the same for each."""
        sines = sine_embed(position.flip(-1) * (2 * pi), self.embed_dim // 2)
        pos = self.adapt_pos2d(sines.to(content).flatten(-2))  # y before x
        axis_pos = self.embed_axes(position)
        x, states = content, []
        for layer in self.layers:
            x = run_checkpointed(self, layer, x, pos, axis_pos, memory, attention_mask)
            states.append(x)
        return torch.stack(states), position.expand(len(states), -1, -1, -1)


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
