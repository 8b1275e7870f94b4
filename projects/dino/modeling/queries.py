"""Mixed query selection: the encoder proposes the boxes, the contents are learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from dn_detr.modeling import Queries
from dn_detr.modeling.queries import ProposalQueries
from dn_detr.modeling.transformers import Memory


class MixedQueries(ProposalQueries):
    """The positions are those of `ProposalQueries`, best first; each rank has a learned content.

    Args:
        num_queries, num_classes, embed_dim, **options: see `ProposalQueries`.

    Source: Zhang et al., "DINO", 2022, section 3.4 (https://arxiv.org/abs/2203.03605).
    """

    def __init__(
        self, num_queries: int, num_classes: int, embed_dim: int = 256, **options: Any
    ) -> None:
        super().__init__(num_queries, num_classes, embed_dim, **options)
        self.content = nn.Embedding(num_queries, embed_dim)
        nn.init.xavier_uniform_(self.content.weight)  # as in DN-DETR's version

    def forward(self, memory: Memory) -> Queries:
        """See `ProposalQueries.forward`."""
        proposed = super().forward(memory)
        return replace(proposed, content=self.content.weight.expand_as(proposed.content))
