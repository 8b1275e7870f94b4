"""The decoder loop that all models of the family share: layer by layer, boxes move.

Liu et al., "DAB-DETR", 2022, section 4 (https://arxiv.org/abs/2201.12329).
Legend: B batch, S cells of all levels, Q queries (denoising queries first), C channels, N layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP, run_checkpointed

from ..heads import DetectionHeads
from .levels import Memory


class BoxDecoder(nn.Module, ABC):
    """Layers that move the queries' boxes: each predicts from the box that the one before left.

    A subclass says in `update` what a layer is called with.

    Args:
        layers: the N decoder layers, see `make_layers`.
        embed_dim: C.
        final_norm: normalise the states that go to the heads. The boxes between the layers are
            moved by the states before this normalisation, as published, so the box that a layer
            predicts is not quite the one that the next layer starts from.
        look_forward_twice: let the loss of a layer's box train the move of the layer before as
            well (Zhang et al., "DINO", 2022, section 3.5).
        query_scale: scale the positions of the queries by their contents, from the second layer
            on; DINO does not.

    Attributes:
        position_kind: what the queries must give, see `PositionKind`.
        activation_checkpointing: see `run_checkpointed`; layer by layer.
    """

    position_kind = "box"

    def __init__(
        self,
        layers: nn.ModuleList,
        embed_dim: int,
        *,
        final_norm: bool,
        look_forward_twice: bool,
        query_scale: bool,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.layers = layers
        self.num_pos_feats = embed_dim // 2
        self.look_forward_twice = look_forward_twice
        self.ref_point_head = MLP(2 * embed_dim, embed_dim, embed_dim, 2)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2) if query_scale else None
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()

    @abstractmethod
    def update(
        self, index: int, x: Tensor, reference: Tensor, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """Run layer `index` on (B, Q, C) states at (B, Q, 4) boxes in [0, 1]; (B, Q, C)."""

    def scale_position(self, index: int, position: Tensor, x: Tensor) -> Tensor:
        """Scale (B, Q, C) positions by the (B, Q, C) contents, from the second layer on."""
        if index == 0 or self.query_scale is None:
            return position
        return position * self.query_scale(x)

    def forward(
        self,
        content: Tensor,
        anchors: Tensor,
        memory: Memory,
        heads: DetectionHeads,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: (B, Q, C).
            anchors: (B, Q, 4) boxes (cx, cy, w, h) before the sigmoid.
            memory: the encoded feature maps.
            heads: move the boxes between the layers.
            attention_mask: (Q, Q) or (B, Q, Q) bool, True = blocked.

        Returns:
            states (N, B, Q, C) of all layers; references (N, B, Q, 4) in [0, 1], the box that
            each layer started from.
        """
        x, reference = content, anchors.sigmoid()
        states, references = [], [reference]
        for index in range(len(self.layers)):
            x = run_checkpointed(self, self.update, index, x, reference, memory, attention_mask)
            states.append(self.norm(x))
            if index + 1 < len(self.layers):
                moved = heads.predict_boxes(index, x, reference)
                reference = moved.detach()
                references.append(moved if self.look_forward_twice else reference)
        return torch.stack(states), torch.stack(references)
