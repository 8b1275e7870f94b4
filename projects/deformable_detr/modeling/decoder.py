"""Deformable DETR's decoders: the position of a query stays, its reference may move.

Zhu et al., "Deformable DETR", 2021, section 4 and appendix A.4 (https://arxiv.org/abs/2010.04159).
Legend: B batch, Q queries (denoising queries first), C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import Any

from torch import Tensor, nn

from dn_detr.layers import sine_embed
from dn_detr.modeling import Decoder, Memory
from dn_detr.modeling.transformers import boxes_of_points
from dn_detr.modeling.transformers.stack import make_layers


class PointDecoder(Decoder):
    """One-stage: the position is a vector, and the point to look from is read from it.

    Args:
        layer: makes a `DeformableDecoderLayer` or a module called like it, see `make_layers`.
        num_layers: how many.
        embed_dim: C.
        refine: the box that a layer predicts is the reference of the next one ("iterative bounding
            box refinement"); else all layers look from the points.
    """

    def __init__(
        self, layer: Callable[..., nn.Module], num_layers: int, embed_dim: int, *, refine: bool
    ) -> None:
        super().__init__(make_layers(layer, num_layers))
        self.refine = refine
        self.reference_points = nn.Linear(embed_dim, 2)
        self.norm = nn.Identity()
        nn.init.zeros_(self.reference_points.bias)

    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See `Decoder.start`."""
        points = self.reference_points(position).sigmoid()
        return content, boxes_of_points(points), position

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`."""
        if index == 0 or not self.refine:
            boxes = boxes[..., :2]
        padded = memory.levels.to_padded(boxes)
        updated: Tensor = self.layers[index](x, pos, padded, memory, mask)
        return updated


class BoxEmbeddingDecoder(Decoder):
    """Two-stage: the encoder proposed a box, whose embedding is content and position.

    The content of a query is added to that; it is 0 in the published model.

    Args:
        layer, num_layers, embed_dim: see `PointDecoder`.
    """

    position_kind = "box"
    refine = True

    def __init__(self, layer: Callable[..., nn.Module], num_layers: int, embed_dim: int) -> None:
        super().__init__(make_layers(layer, num_layers))
        self.pos_trans = nn.Linear(2 * embed_dim, 2 * embed_dim)
        self.pos_trans_norm = nn.LayerNorm(2 * embed_dim)
        self.norm = nn.Identity()

    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See `Decoder.start`; positions are boxes before the sigmoid."""
        boxes = position.sigmoid()
        sines = sine_embed(boxes * (2 * pi), content.shape[-1] // 2).flatten(-2)
        pos, of_box = self.pos_trans_norm(self.pos_trans(sines.to(content))).chunk(2, -1)
        return content + of_box, boxes, pos

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`."""
        updated: Tensor = self.layers[index](x, pos, memory.levels.to_padded(boxes), memory, mask)
        return updated
