"""Prediction heads: class and box of every query after every decoder layer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP
from dn_detr.structures import at_least_float32, inverse_sigmoid

from .classification import Classification, FocalClassification
from .pairs import Outputs

if TYPE_CHECKING:
    from .transformers.levels import Memory


def box_head(embed_dim: int) -> MLP:
    """MLP (..., C) -> (..., 4) moves of a box before the sigmoid; it starts from no move."""
    head = MLP(embed_dim, embed_dim, 4, 3)
    nn.init.zeros_(head.get_parameter("layers.2.weight"))
    nn.init.zeros_(head.get_parameter("layers.2.bias"))
    return head


class DetectionHeads(nn.Module):
    """A class head and a box head for every decoder layer, equal at the start.

    Args:
        num_classes: K.
        embed_dim: channels C of a query.
        num_layers: decoder layers N; without effect where they share their heads.
        shared: one class head and one box head serve all layers, as in the dense models.
        size_bias: added to width and height (before the sigmoid) by the first layer's box head at
            the start. The published one-stage deformable models start from -2, smaller boxes
            than their anchors.
        classification: what the logits mean, and so how many there are.
        eps: see `inverse_sigmoid`.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int = 256,
        num_layers: int = 6,
        *,
        shared: bool = False,
        size_bias: float = 0.0,
        classification: Classification | None = None,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.shared = shared
        self.classification = classification or FocalClassification()
        self.eps = eps
        classes = self.classification.class_head(embed_dim, num_classes)
        boxes = box_head(embed_dim)
        count = 1 if shared else num_layers
        self.class_embed = nn.ModuleList(copy.deepcopy(classes) for _ in range(count))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(boxes) for _ in range(count))
        nn.init.constant_(self.bbox_embed[0].get_parameter("layers.2.bias")[2:], size_bias)

    def predict_boxes(self, layer: int, states: Tensor, references: Tensor) -> Tensor:
        """Move the references as layer `layer` wants them moved.

        Args:
            layer: index in [0, N).
            states: (..., C).
            references: (..., 4) boxes (cx, cy, w, h) in [0, 1].

        Returns:
            (..., 4) boxes in [0, 1], float32 or wider.
        """
        moves = at_least_float32(self.bbox_embed[self._head(layer)](states))
        return (moves + inverse_sigmoid(references, self.eps)).sigmoid()

    def forward(self, states: Tensor, references: Tensor, memory: Memory | None = None) -> Outputs:
        """Predict from all layers.

        Args:
            states: (N, B, Q, C).
            references: (N, B, Q, 4) the box that each layer started from, in [0, 1].
            memory: the encoded feature maps; without effect here, for heads that predict masks.

        Returns:
            `pred_logits` (N, B, Q, L) and `pred_boxes` (N, B, Q, 4) as (cx, cy, w, h) in [0, 1];
            float32 or wider.
        """
        logits = [
            at_least_float32(self.class_embed[self._head(i)](x)) for i, x in enumerate(states)
        ]
        layers = zip(states, references, strict=True)
        boxes = [self.predict_boxes(i, x, r) for i, (x, r) in enumerate(layers)]
        return {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(boxes)}

    def class_tensors(self) -> list[str]:
        """Names of the tensors that have a row per class."""
        return [f"class_embed.{name}" for name in self.class_embed.state_dict()]

    def _head(self, layer: int) -> int:
        return 0 if self.shared else layer
