"""Prediction heads: class and box of every query after every decoder layer."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dn_detr.layers import MLP
from dn_detr.structures import at_least_float32, inverse_sigmoid

_PRIOR = 0.01  # expected foreground share at the start, Lin et al., "Focal Loss", section 3.3


class DetectionHeads(nn.Module):
    """One class head and one box head per decoder layer, equal at the start.

    Args:
        num_classes: K.
        embed_dim: channels C of a query.
        num_layers: decoder layers N.
    """

    def __init__(self, num_classes: int, embed_dim: int = 256, num_layers: int = 6) -> None:
        super().__init__()
        self.num_classes = num_classes
        class_embed = nn.Linear(embed_dim, num_classes)
        nn.init.constant_(class_embed.bias, -math.log((1 - _PRIOR) / _PRIOR))
        bbox_embed = MLP(embed_dim, embed_dim, 4, 3)
        nn.init.zeros_(_last_linear(bbox_embed).weight)
        nn.init.zeros_(_last_linear(bbox_embed).bias)
        self.class_embed = nn.ModuleList(copy.deepcopy(class_embed) for _ in range(num_layers))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(bbox_embed) for _ in range(num_layers))
        # Published: the first layer starts from smaller boxes than its anchors.
        nn.init.constant_(_last_linear(self.bbox_embed[0]).bias[2:], -2.0)

    def predict_boxes(self, layer: int, states: Tensor, references: Tensor) -> Tensor:
        """Move the references as layer ``layer`` wants them moved.

        Args:
            layer: index in [0, N).
            states: (..., C).
            references: (..., 4) boxes (cx, cy, w, h) in [0, 1].

        Returns:
            (..., 4) boxes in [0, 1], float32 or wider.
        """
        moves = at_least_float32(self.bbox_embed[layer](states))
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
        heads = zip(self.class_embed, states, strict=True)
        logits = [at_least_float32(head(x)) for head, x in heads]
        layers = zip(states, references, strict=True)
        boxes = [self.predict_boxes(i, x, r) for i, (x, r) in enumerate(layers)]
        return torch.stack(logits), torch.stack(boxes)


def _last_linear(mlp: nn.Module) -> nn.Linear:
    return [module for module in mlp.modules() if isinstance(module, nn.Linear)][-1]
