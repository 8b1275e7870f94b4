"""What decoders share: the loop over the layers, and the parts of a layer.

Legend: B batch, S cells of all levels, Q queries (denoising queries first), C channels, N layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_detr.layers import MLP, FeedForward, run_checkpointed

from ..heads import DetectionHeads
from .levels import Memory


def boxes_of_points(points: Tensor) -> Tensor:
    """(..., 2) points in [0, 1] -> (..., 4) boxes of half the image, whose sides heads do not move.

    Heads add their moves before the sigmoid, where the side 0.5 is 0.
    """
    return F.pad(points, (0, 2), value=0.5)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory, feed-forward; post-norm.

    A subclass chooses the attentions and says in `forward` what they are called with.

    Args:
        embed_dim: C.
        self_attn: among the queries.
        cross_attn: to the memory.
        feedforward_dim: hidden channels of the feed-forward half.
        dropout: probability after attention and in the feed-forward half.
        activation: of the feed-forward half, see `FeedForward`.
    """

    def __init__(
        self,
        embed_dim: int,
        self_attn: nn.Module,
        cross_attn: nn.Module,
        *,
        feedforward_dim: int,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.self_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = cross_attn
        self.cross_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout, activation)
        self.dropout = nn.Dropout(dropout)

    def attend_to_queries(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Contents and positions (B, Q, C), mask (B, Q, Q) bool, True = blocked -> (B, Q, C)."""
        positioned = x + position
        found = self.self_attn(positioned, positioned, x, mask=mask)
        return self.add_self_attention(x, found)

    def add_self_attention(self, x: Tensor, found: Tensor) -> Tensor:
        """Add (B, Q, C) that the self-attention found, and normalise."""
        normalised: Tensor = self.self_norm(x + self.dropout(found))
        return normalised

    def add_cross_attention(self, x: Tensor, found: Tensor) -> Tensor:
        """Add (B, Q, C) that the attention to the memory found, and run the feed-forward half."""
        updated: Tensor = self.ffn(self.cross_norm(x + self.dropout(found)))
        return updated


class Decoder(nn.Module, ABC):
    """Layers one after the other; the heads predict from each of them.

    A subclass says in `start` where the queries start, in `update` what a layer is called with,
    and has a module `norm` for the states that go to the heads.

    Args:
        layers: the N decoder layers, see `make_layers`.

    Attributes:
        position_kind: what the queries must give, see `PositionKind`.
        refine: the box that a layer predicts is the reference of the next one; else all layers
            have that of the first.
        look_forward_twice: let the loss of a layer's box train the move of the layer before as
            well (Zhang et al., "DINO", 2022, section 3.5).
        activation_checkpointing: see `run_checkpointed`; layer by layer.
    """

    position_kind = "vector"
    refine = False
    look_forward_twice = False
    norm: nn.Module

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.layers = layers

    @abstractmethod
    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Where the queries start.

        Args:
            content: (B, Q, C).
            position: (B, Q, P), see `PositionKind`.

        Returns:
            content (B, Q, C), references (B, Q, 4) as boxes in [0, 1], and what `update` gets of
            the positions in every layer.
        """

    @abstractmethod
    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """Run layer `index` on states (B, Q, C) at boxes (B, Q, 4); `pos` comes from `start`."""

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        memory: Memory,
        heads: DetectionHeads,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: (B, Q, C).
            position: (B, Q, P), see `PositionKind`.
            memory: the encoded feature maps.
            heads: move the boxes between the layers.
            attention_mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            states (N, B, Q, C) of all layers; references (N, B, Q, 4) in [0, 1], the box that
            each layer started from.
        """
        x, reference, pos = self.start(content, position)
        states, references = [], [reference]
        for index in range(len(self.layers)):
            x = run_checkpointed(
                self, self.update, index, x, reference, pos, memory, attention_mask
            )
            states.append(self.norm(x))
            if index + 1 < len(self.layers):
                moved = reference
                if self.refine:
                    moved = heads.predict_boxes(index, x, reference)
                    reference = moved.detach()
                references.append(moved if self.look_forward_twice else reference)
        return torch.stack(states), torch.stack(references)


class BoxDecoder(Decoder):
    """The decoder of DAB-DETR and what came of it: the positions are boxes, which move.

    Args:
        layers: see `Decoder`.
        embed_dim: C.
        final_norm: normalise the states that go to the heads. The boxes between the layers are
            moved by the states before this normalisation, as published, so the box that a layer
            predicts is not quite the one that the next layer starts from.
        look_forward_twice: see `Decoder`.
        query_scale: scale the positions of the queries by their contents, from the second layer
            on; DINO does not.

    Source: Liu et al., "DAB-DETR", 2022, section 4 (https://arxiv.org/abs/2201.12329).
    """

    position_kind = "box"
    refine = True

    def __init__(
        self,
        layers: nn.ModuleList,
        embed_dim: int,
        *,
        final_norm: bool,
        look_forward_twice: bool,
        query_scale: bool,
    ) -> None:
        super().__init__(layers)
        self.num_pos_feats = embed_dim // 2
        self.look_forward_twice = look_forward_twice
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if query_scale else None
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()

    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See `Decoder.start`; positions are boxes before the sigmoid, embedded in each layer."""
        return content, position.sigmoid(), None

    def scale_position(self, index: int, position: Tensor, x: Tensor) -> Tensor:
        """Scale (B, Q, C) positions by the (B, Q, C) contents, from the second layer on."""
        if index == 0 or self.query_scale is None:
            return position
        return position * self.query_scale(x)
