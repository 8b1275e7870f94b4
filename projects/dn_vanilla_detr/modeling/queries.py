"""Queries whose position is a learned vector, and noised objects as such queries."""

from __future__ import annotations

from torch import Tensor, nn

from dn_detr.modeling import Memory, PositionKind, Queries


class VectorQueries(nn.Module):
    """Learned positions, the same for every image; the contents start from zeros.

    Args:
        num_queries: Q.
        embed_dim: C.

    Source: Carion et al., "DETR", 2020, section 3.2 (https://arxiv.org/abs/2005.12872).
    """

    num_patterns = 0
    position_kind: PositionKind = "vector"

    def __init__(self, num_queries: int, embed_dim: int = 256) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries {num_queries} must be at least 1")
        self.num_queries = num_queries
        self.position = nn.Embedding(num_queries, embed_dim)

    def forward(self, memory: Memory) -> Queries:
        """Content and position (B, Q, C) of the queries of a batch."""
        position = self.position.weight.expand(len(memory.cells), -1, -1)
        return Queries(position.new_zeros(position.shape), position)


class VectorQueryEmbedding(nn.Module):
    """A noised label becomes the content, a linear map of the noised box the position.

    The linear map is the paper's. It does not say which of the two is the content; this is how
    DN-DAB-DETR has it, and matching queries stay what they are without denoising.

    Args:
        num_classes: K.
        embed_dim: C.

    Source: Li et al., "DN-DETR", extended version, 2022, section 4.7.2
    (https://arxiv.org/abs/2203.01305).
    """

    position_kind: PositionKind = "vector"

    def __init__(self, num_classes: int, embed_dim: int = 256) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.label_embed = nn.Embedding(num_classes, embed_dim)
        self.box_embed = nn.Linear(4, embed_dim)

    def forward(self, labels: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (M,), boxes (M, 4) in [0, 1] and groups (M,) -> content and position (M, C)."""
        return self.label_embed(labels), self.box_embed(boxes)

    def class_tensors(self) -> list[str]:
        """Names of the tensors that have a row per class."""
        return ["label_embed.weight"]
