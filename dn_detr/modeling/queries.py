"""Object queries: learned contents and anchor boxes, or proposals of the encoder (two-stage).

Liu et al., "DAB-DETR", 2022, section 4 (https://arxiv.org/abs/2201.12329); two-stage: Zhu et al.,
"Deformable DETR", 2021, section 4.2 and appendix A.4 (https://arxiv.org/abs/2010.04159).
Legend: B batch, S cells of all levels, Q queries, P patterns, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_detr.structures import at_least_float32, inverse_sigmoid

from .classification import Classification, FocalClassification
from .heads import box_head
from .pairs import Outputs
from .transformers.levels import Memory

PositionKind = Literal["box", "point", "vector"]
"""What the position of a query is: a box (cx, cy, w, h) before the sigmoid, a point (x, y) in
[0, 1], or a vector of C channels. The decoder must expect what the queries give."""


_MARGIN = 0.01  # of the image: where a proposal's centre or side is not used
_SATURATED = 100.0  # its sigmoid is 1


@dataclass(frozen=True)
class Proposals:
    """What the encoder itself detects, in the cells that are trained to: those that became queries.

    Attributes:
        outputs: `pred_logits` (1, B, Q, L) and `pred_boxes` (1, B, Q, 4), float32 or wider; of
            all cells where `class_agnostic`.
        padding: (B, Q) bool, True = no cell of the image, or None where padding takes part.
        class_agnostic: they are trained to predict class 0 for every object.
    """

    outputs: Outputs
    padding: Tensor | None
    class_agnostic: bool = False


@dataclass(frozen=True)
class Queries:
    """The matching queries of a batch.

    Attributes:
        content: (B, Q, C).
        position: (B, Q, P), see `PositionKind`.
        proposals: predictions that became the queries, to be trained too, or None.
    """

    content: Tensor
    position: Tensor
    proposals: Proposals | None = None


class BoxQueryEmbedding(nn.Module):
    """How a noised label and box become a query like those of the classes below.

    The content is a learned row of the label, the position the box. Queries of another kind bring
    their own; `QueryDenoising` calls it.

    Args:
        num_classes: K.
        embed_dim: channels C of the content.
        indicator: the last channel is 1 instead of learned, see `AnchorQueries`.
        no_object_label: the table has one row more than there are classes, as the published
            deformable models have it, which never use it. (The dense ones use it as content of
            the matching queries; here those own it, see `AnchorQueries`.)
        eps: see `inverse_sigmoid`.
    """

    position_kind: PositionKind = "box"

    def __init__(
        self,
        num_classes: int,
        embed_dim: int = 256,
        *,
        indicator: bool = True,
        no_object_label: bool = True,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.indicator = indicator
        self.eps = eps
        num_labels = num_classes + int(no_object_label)
        self.label_embed = nn.Embedding(num_labels, embed_dim - int(indicator))

    def forward(self, labels: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Embed noised objects.

        Args:
            labels: (M,) int64 in [0, K).
            boxes: (M, 4) as (cx, cy, w, h) in [0, 1].
            groups: (M,) int64, index of the denoising group; without effect here.

        Returns:
            content (M, C) and position (M, 4) of a query for each.
        """
        content = F.pad(self.label_embed(labels), (0, int(self.indicator)), value=1.0)
        return content, inverse_sigmoid(boxes, self.eps)

    def class_tensors(self) -> list[str]:
        """Names of the tensors that have a row per class."""
        return ["label_embed.weight"]


class VectorQueryEmbedding(BoxQueryEmbedding):
    """A noised label becomes the content, a linear map of the noised box the position.

    The linear map is the paper's. It does not say which of the two is the content; this is how
    DN-DAB-DETR has it, and matching queries stay what they are without denoising.

    Args:
        num_classes, embed_dim: see `BoxQueryEmbedding`.

    Source: Li et al., "DN-DETR", extended version, 2022, section 4.7.2
    (https://arxiv.org/abs/2203.01305).
    """

    position_kind: PositionKind = "vector"

    def __init__(self, num_classes: int, embed_dim: int = 256) -> None:
        super().__init__(num_classes, embed_dim, indicator=False, no_object_label=False)
        self.box_embed = nn.Linear(4, embed_dim)

    def forward(self, labels: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `BoxQueryEmbedding.forward`; content and position are (M, C)."""
        return self.label_embed(labels), self.box_embed(boxes)


class AnchorQueries(nn.Module):
    """Learned queries, the same for every image.

    Args:
        num_queries: number of anchors A.
        embed_dim: channels C of the content.
        content: `per_query` learns one content for each anchor (deformable models), `shared` one
            for all of them (dense DN models), `zero` none (dense DAB models).
        num_patterns: P learned patterns; each is added to the content of a copy of all queries
            (Wang et al., "Anchor DETR", 2022, section 3.3). 0: none, and one copy.
        indicator: the last channel is not learned but 0, which tells matching queries from
            denoising queries, whose last channel is 1 (DN-DETR, section 4). Patterns have it.
        position_kind: what an anchor is: a box in DAB-DETR, a point in Anchor DETR, a vector in
            DETR.

    Raises:
        ValueError: no query, a negative number of patterns, or an unknown kind of content or
            position.
    """

    def __init__(
        self,
        num_queries: int = 300,
        embed_dim: int = 256,
        *,
        content: str = "per_query",
        num_patterns: int = 0,
        indicator: bool = True,
        position_kind: PositionKind = "box",
    ) -> None:
        super().__init__()
        rows = {"per_query": num_queries, "shared": 1, "zero": 0}
        if num_queries < 1:
            raise ValueError(f"num_queries {num_queries} must be at least 1")
        if num_patterns < 0:
            raise ValueError(f"num_patterns {num_patterns} must be at least 0")
        if content not in rows:
            raise ValueError(f"content {content!r}: choose from {sorted(rows)}")
        sizes = {"box": 4, "point": 2, "vector": embed_dim}
        if position_kind not in sizes:
            raise ValueError(f"position_kind {position_kind!r}: choose from {sorted(sizes)}")
        self.num_queries = num_queries
        self.num_patterns = num_patterns
        self.embed_dim = embed_dim
        self.indicator = indicator
        self.position_kind = position_kind
        width = embed_dim - int(indicator)
        self.content = nn.Embedding(rows[content], width) if rows[content] else None
        self.anchors = nn.Embedding(num_queries, sizes[position_kind])
        self.patterns = nn.Embedding(num_patterns, embed_dim) if num_patterns else None
        if position_kind == "point":
            nn.init.uniform_(self.anchors.weight)

    def forward(self, memory: Memory) -> Queries:
        """The queries of a batch, A * max(P, 1) of them, pattern after pattern."""
        anchors = self.anchors.weight
        content = anchors.new_zeros(1, self.embed_dim)
        if self.content is not None:
            content = F.pad(self.content.weight, (0, int(self.indicator)))
        content = content.expand(self.num_queries, -1)
        if self.patterns is not None:
            content = (self.patterns.weight[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(self.num_patterns, 1)
        batch = len(memory.cells)
        return Queries(content.expand(batch, -1, -1), anchors.expand(batch, -1, -1))


class ProposalQueries(nn.Module):
    """The cells of the memory that look most like objects become the queries (two-stage).

    Args:
        num_queries: Q.
        num_classes: K.
        embed_dim: C.
        base_size: side of the box that a cell of the finest level proposes, as a share of the
            image; it doubles with every level.
        mask_padding: cells of the padding are neither chosen nor trained. False is the published
            behaviour, where they compete.
        class_agnostic: class 0 says how much a cell looks like any object, and all cells are
            trained so, not the chosen ones alone, as two-stage Deformable DETR was published.
        classification: what the logits of a cell mean.
        content: `proposed` takes the features of the cells, `learned` a learned row for each rank
            (mixed query selection, Zhang et al., "DINO", 2022, section 3.4), `zero` nothing.

    Attributes:
        position_kind: see `PositionKind`.

    Raises:
        ValueError: no query, an unknown kind of content, or `class_agnostic` with a loss that is a
            mean over queries.
    """

    num_patterns = 0
    position_kind: PositionKind = "box"

    def __init__(
        self,
        num_queries: int,
        num_classes: int,
        embed_dim: int = 256,
        *,
        base_size: float = 0.05,
        mask_padding: bool = True,
        class_agnostic: bool = False,
        classification: Classification | None = None,
        content: str = "proposed",
    ) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries {num_queries} must be at least 1")
        if content not in (kinds := ("proposed", "learned", "zero")):
            raise ValueError(f"content {content!r}: choose from {sorted(kinds)}")
        self.num_queries = num_queries
        self.num_classes = num_classes
        self.base_size = base_size
        self.mask_padding = mask_padding
        self.class_agnostic = class_agnostic
        self.output = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.classification = classification or FocalClassification()
        if class_agnostic and self.classification.total_weight(1, 1):
            raise ValueError(
                "class_agnostic trains all cells, whose number no step knows in advance, but "
                f"{type(self.classification).__name__} is a mean over them; take "
                "FocalClassification, or class_agnostic=False"
            )
        self.class_embed = self.classification.class_head(embed_dim, num_classes)
        self.bbox_embed = box_head(embed_dim)
        nn.init.xavier_uniform_(self.output.weight)
        self.has_content = content != "zero"
        self.content: nn.Embedding | None = None
        if content == "learned":
            self.content = nn.Embedding(num_queries, embed_dim)
            nn.init.xavier_uniform_(self.content.weight)  # as in DN-DETR's version

    def forward(self, memory: Memory) -> Queries:
        """The Q proposals of each image with the highest class logit, best first.

        What is proposed carries no gradient; the proposals are trained by their own loss.
        """
        cells, boxes, padding = self._grid(memory)
        features = self.norm(self.output(cells))
        logits = at_least_float32(self.class_embed(features))
        moved = at_least_float32(self.bbox_embed(features)) + boxes
        score = logits.detach()[..., : 1 if self.class_agnostic else self.num_classes].amax(-1)
        if self.mask_padding:
            score = score.masked_fill(padding, -torch.inf)
        chosen = score.topk(self.num_queries, dim=1).indices
        content, chosen_logits, position = (
            x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
            for x in (features, logits, moved)
        )
        if not self.class_agnostic:
            logits, moved, padding = chosen_logits, position, padding.gather(1, chosen)
        outputs = {"pred_logits": logits[None], "pred_boxes": moved.sigmoid()[None]}
        unused = padding if self.mask_padding else None
        proposals = Proposals(outputs, unused, self.class_agnostic)
        content = content.detach() if self.has_content else torch.zeros_like(content)
        if self.content is not None:
            content = self.content.weight.expand_as(content)
        return Queries(content, position.detach(), proposals)

    def class_tensors(self) -> list[str]:
        """Names of the tensors that have a row per class."""
        return ["class_embed.weight", "class_embed.bias"]

    def _grid(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, S, C), boxes before the sigmoid (B, S, 4) and padding (B, S) of all cells.

        Cells near the border, whose box would be cut off, propose the whole image from empty
        features; so do the cells that are added to the padding where S < Q.
        """
        levels = memory.levels
        centres = levels.cell_centres()
        sizes = [
            centres.new_full((count,), self.base_size * 2.0**level)
            for level, count in enumerate(levels.sizes)
        ]
        side = torch.cat(sizes).expand(len(centres), -1)[..., None]
        boxes = torch.cat([centres, side, side], dim=-1)
        usable = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1) & ~levels.padding_mask
        cells = memory.cells.masked_fill(~usable[..., None], 0.0)
        boxes = boxes.logit().masked_fill(~usable[..., None], _SATURATED)
        extra = max(0, self.num_queries - cells.shape[1])
        return (
            F.pad(cells, (0, 0, 0, extra)),
            F.pad(boxes, (0, 0, 0, extra), value=_SATURATED),
            F.pad(levels.padding_mask, (0, extra), value=True),
        )
