"""Prediction heads: class and box of every query after every decoder layer."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP
from dn_detr.structures import at_least_float32, inverse_sigmoid

_PRIOR = 0.01  # expected foreground share at the start, Lin et al., "Focal Loss", section 3.3


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """Linear layer (..., C) -> (..., K) logits that starts from the prior of the focal loss."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - _PRIOR) / _PRIOR))
    return head


def box_head(embed_dim: int) -> MLP:
    """MLP (..., C) -> (..., 4) moves of a box before the sigmoid; it starts from no move."""
    head = MLP(embed_dim, embed_dim, 4, 3)
    nn.init.zeros_(_last_layer(head).weight)
    nn.init.zeros_(_last_layer(head).bias)
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
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int = 256,
        num_layers: int = 6,
        *,
        shared: bool = False,
        size_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.shared = shared
        classes, boxes = class_head(embed_dim, num_classes), box_head(embed_dim)
        count = 1 if shared else num_layers
        self.class_embed = nn.ModuleList(copy.deepcopy(classes) for _ in range(count))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(boxes) for _ in range(count))
        nn.init.constant_(_last_layer(self.bbox_embed[0]).bias[2:], size_bias)

    def predict_boxes(self, layer: int, states: Tensor, references: Tensor) -> Tensor:
        """Move the references as layer ``layer`` wants them moved.

        Args:
            layer: index in [0, N).
            states: (..., C).
            references: (..., 4) boxes (cx, cy, w, h) in [0, 1].

        Returns:
            (..., 4) boxes in [0, 1], float32 or wider.
        """
        moves = at_least_float32(self.bbox_embed[self._head(layer)](states))
        return (moves + inverse_sigmoid(references)).sigmoid()

    def forward(self, states: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from all layers.

        Args:
            states: (N, B, Q, C).
            references: (N, B, Q, 4) the box that each layer started from, in [0, 1].

        Returns:
            logits (N, B, Q, K) and boxes (N, B, Q, 4) as (cx, cy, w, h) in [0, 1];
            float32 or wider.
        """
        logits = [
            at_least_float32(self.class_embed[self._head(i)](x)) for i, x in enumerate(states)
        ]
        layers = zip(states, references, strict=True)
        boxes = [self.predict_boxes(i, x, r) for i, (x, r) in enumerate(layers)]
        return torch.stack(logits), torch.stack(boxes)

    def _head(self, layer: int) -> int:
        return 0 if self.shared else layer


def _last_layer(mlp: nn.Module) -> nn.Linear:
    return [module for module in mlp.modules() if isinstance(module, nn.Linear)][-1]
