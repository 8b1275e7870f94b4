"""Conditional DETR's decoder: every layer looks from the same points.

Meng et al., "Conditional DETR", 2021, section 3.3 (https://arxiv.org/abs/2108.06152).
Legend: B batch, Q queries (denoising queries first), C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dn_detr.layers import MLP, sine_embed_boxes
from dn_detr.modeling import Decoder, Memory
from dn_detr.modeling.transformers import boxes_of_points
from dn_detr.modeling.transformers.stack import make_layers


class ConditionalDecoder(Decoder):
    """A query's position is a vector, and its point is read from it.

    Args:
        layer: makes a `DenseDecoderLayer` or a module called like it, see `make_layers`; the
            first one with `is_first=True`.
        num_layers: how many.
        embed_dim: C.
    """

    def __init__(self, layer: Callable[..., nn.Module], num_layers: int, embed_dim: int) -> None:
        super().__init__(make_layers(layer, num_layers, is_first=True))
        self.ref_point_head = MLP(embed_dim, embed_dim, 2, 2)
        self.query_scale = MLP(embed_dim, embed_dim, embed_dim, 2)
        self.norm = nn.LayerNorm(embed_dim)

    def start(self, content: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Any]:
        """See `Decoder.start`."""
        points = self.ref_point_head(position).sigmoid()
        sine = sine_embed_boxes(points, content.shape[-1] // 2).to(content)
        return content, boxes_of_points(points), (position, sine)

    def update(
        self, index: int, x: Tensor, boxes: Tensor, pos: Any, memory: Memory, mask: Tensor | None
    ) -> Tensor:
        """See `Decoder.update`; the contents scale the sines from the second layer on."""
        position, sine = pos
        if index:
            sine = sine * self.query_scale(x)
        updated: Tensor = self.layers[index](x, position, sine, memory, mask)
        return updated
