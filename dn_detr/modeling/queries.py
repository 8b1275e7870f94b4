"""Object queries as learned content and learned anchor boxes.

Liu et al., "DAB-DETR", 2022, section 4 (https://arxiv.org/abs/2201.12329).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class AnchorQueries(nn.Module):
    """The matching queries: the same for every image.

    Args:
        num_queries: Q.
        embed_dim: channels C of the content.
        indicator: the last channel is not learned but 0, which tells matching queries from
            denoising queries, whose last channel is 1 (DN-DETR, section 4).

    Raises:
        ValueError: no query.
    """

    def __init__(
        self, num_queries: int = 300, embed_dim: int = 256, *, indicator: bool = True
    ) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries {num_queries} must be at least 1")
        self.num_queries = num_queries
        self.indicator = indicator
        self.content = nn.Embedding(num_queries, embed_dim - int(indicator))
        self.anchors = nn.Embedding(num_queries, 4)

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Content (B, Q, C) and anchors (B, Q, 4) as (cx, cy, w, h) before the sigmoid."""
        content = F.pad(self.content.weight, (0, int(self.indicator)))
        return content.expand(batch_size, -1, -1), self.anchors.weight.expand(batch_size, -1, -1)
