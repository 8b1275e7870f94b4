"""Query denoising: noised ground truth as extra decoder queries that must find their way back.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2022, section 4
(https://arxiv.org/abs/2203.01305). Usable in any detector whose decoder takes content and anchor
boxes; see docs/denoising.md. It differs from the published code where that made a step depend on
which images share a batch: slots that stay empty are masked, the loss is normalised over all
ranks, each image draws its own noise, and the number of queries is bounded.

Legend: B batch, D denoising slots, Q matching queries, C channels, N decoder layers, K classes,
M noised boxes of the batch, n objects of one image, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dn_detr.structures import inverse_sigmoid

from .losses import box_losses, complete_weights, count_per_rank, focal_loss, weigh_and_name
from .matcher import Targets

_EMPTY = -1  # group of a slot that holds no noised box
_MATCHING = -2  # group of a matching query


@dataclass(frozen=True)
class NoisedQueries:
    """Denoising queries before the matching queries, and what they are to predict.

    Attributes:
        content: (B, D + Q, C).
        anchors: (B, D + Q, 4) boxes (cx, cy, w, h) before the sigmoid.
        attention_mask: (B, D + Q, D + Q) bool, True = blocked: nobody but its own group sees a
            denoising query, and nobody sees an empty slot.
        image: (M,) int64, image of each noised box.
        slot: (M,) int64, its slot in [0, D).
        labels: (M,) int64, its true class.
        boxes: (M, 4) its true box (cx, cy, w, h) in [0, 1].
        num_slots: D, 0 if no image has an object.
    """

    content: Tensor
    anchors: Tensor
    attention_mask: Tensor
    image: Tensor
    slot: Tensor
    labels: Tensor
    boxes: Tensor
    num_slots: int

    def split(self, *outputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Separate decoder outputs (..., D + Q, channels).

        Returns:
            The denoising parts (..., D, channels), and the matching parts (..., Q, channels).
        """
        denoising = tuple(x[..., : self.num_slots, :] for x in outputs)
        matching = tuple(x[..., self.num_slots :, :] for x in outputs)
        return denoising, matching


@dataclass(frozen=True)
class Noise:
    """The random draws of one image: G repetitions of its n objects, all on the CPU.

    Attributes:
        flip: (G, n) in [0, 1); a label is replaced where this is less than the label noise.
        label: (G, n) int64 in [0, K), the replacement.
        box: (G, n, 4) in [0, 1); 0.5 leaves a coordinate where it is.
    """

    flip: Tensor
    label: Tensor
    box: Tensor


@dataclass(frozen=True)
class _Placement:
    """Where the M noised boxes of a batch go, all on the CPU.

    ``image`` and ``slot`` are those of ``NoisedQueries``.

    Attributes:
        source: (M,) int64, index into the objects of all images, concatenated.
        noise: of each of them, without the group dimension.
        group: (B, D) int64, the group that each slot belongs to; -1 for an empty, hidden one.
    """

    image: Tensor
    slot: Tensor
    source: Tensor
    noise: Noise
    group: Tensor


class QueryDenoising(nn.Module):
    """Builds denoising queries from ground truth and computes their loss.

    Args:
        num_classes: K.
        embed_dim: C.
        num_groups: how often each object is noised; groups do not see each other.
        label_noise: probability that a label is replaced by a random one.
        box_noise: largest shift of a centre in half box sizes, and largest change of a side in
            box sizes.
        max_queries: bound of D. An image with n objects gets min(num_groups, max_queries // n)
            groups; with n > max_queries one group of a random choice of its objects. The default
            leaves all five groups to every image of up to 100 objects, as published. (Where
            empty slots are visible, a group of the fullest image is never cut.)
        indicator: the last content channel is 1 instead of learned; matching queries have 0 there.
        no_object_label: the table of labels has one row more than there are classes, as the
            published deformable models have it, which never use it. (The dense ones use it as
            content of the matching queries; here those own it, see ``AnchorQueries``.)
        mask_empty_slots: hide the slots that images with fewer objects leave empty. False is the
            published behaviour: a group has as many slots as the fullest image has objects, and
            its queries see the empty ones (all-zero content, a box of half the image).
        weights: factors of ``loss_ce``, ``loss_bbox`` and ``loss_giou``.
        alpha: focal weight of a positive.
        gamma: focal exponent.

    Raises:
        ValueError: a number of groups or queries below 1, or a probability outside [0, 1].
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int = 256,
        *,
        num_groups: int = 5,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
        max_queries: int = 500,
        indicator: bool = True,
        no_object_label: bool = True,
        mask_empty_slots: bool = True,
        weights: Mapping[str, float] | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        if num_groups < 1 or max_queries < 1:
            raise ValueError(
                f"num_groups {num_groups} and max_queries {max_queries} must be at least 1; "
                "train without denoising with model.denoising=null"
            )
        if not 0 <= label_noise <= 1 or box_noise < 0:
            raise ValueError(
                f"label_noise {label_noise} must lie in [0, 1] and box_noise {box_noise} be >= 0"
            )
        self.num_classes = num_classes
        self.num_groups = num_groups
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.max_queries = max_queries
        self.indicator = indicator
        self.mask_empty_slots = mask_empty_slots
        num_labels = num_classes + int(no_object_label)
        self.label_embed = nn.Embedding(num_labels, embed_dim - int(indicator))
        self.weights = complete_weights(weights)
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self,
        targets: Targets,
        content: Tensor,
        anchors: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> NoisedQueries:
        """Put noised ground truth before the matching queries.

        Args:
            targets: per image ``labels`` (n,) int64 in [0, K) and ``boxes`` (n, 4) as (cx, cy,
                w, h) in [0, 1].
            content: (B, Q, C) of the matching queries.
            anchors: (B, Q, 4) of the matching queries, before the sigmoid.
            seeds: one integer per image; its noise is a function of it. By default they are drawn
                from torch's global generator.

        Raises:
            ValueError: not one target (and seed) per image of ``content``.
        """
        if len(targets) != len(content):
            raise ValueError(f"{len(targets)} targets for a batch of {len(content)} images")
        if seeds is None:
            seeds = torch.randint(2**62, (len(targets),)).tolist()
        device = content.device
        placed = self._place([len(t["labels"]) for t in targets], seeds)
        image, slot, source = (x.to(device) for x in (placed.image, placed.slot, placed.source))
        labels = torch.cat([t["labels"] for t in targets])[source]
        boxes = torch.cat([t["boxes"] for t in targets])[source].to(anchors.dtype)
        noised_labels, noised_boxes = self._add_noise(labels, boxes, placed.noise)
        num_slots = placed.group.shape[1]
        content_BDC = content.new_zeros(len(targets), num_slots, content.shape[-1])
        content_BDC[image, slot] = self._embed(noised_labels).to(content.dtype)
        anchors_BD4 = anchors.new_zeros(len(targets), num_slots, 4)
        anchors_BD4[image, slot] = inverse_sigmoid(noised_boxes)
        return NoisedQueries(
            content=torch.cat([content_BDC, content], dim=1),
            anchors=torch.cat([anchors_BD4, anchors], dim=1),
            attention_mask=_attention_mask(placed.group.to(device), content.shape[1]),
            image=image,
            slot=slot,
            labels=labels,
            boxes=boxes,
            num_slots=num_slots,
        )

    def loss(
        self,
        logits: Tensor,
        boxes: Tensor,
        noised: NoisedQueries,
        *,
        count: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Weighted reconstruction losses of all layers.

        Without any object all terms are zeros that still belong to the graph.

        Args:
            logits: (N, B, D, K) float32, the denoising part.
            boxes: (N, B, D, 4) float32 as (cx, cy, w, h) in [0, 1], the denoising part.
            noised: what ``forward`` returned.
            count: what every term is divided by, see ``mean_over_ranks``; by default the number of
                noised boxes per rank (over all ranks, at least one).

        Returns:
            Scalars ``loss_ce_dn``, ``loss_bbox_dn``, ``loss_giou_dn`` of the last layer, and the
            same with suffix ``_i`` of each layer i before it.
        """
        pair_logits = logits[:, noised.image, noised.slot]  # (N, M, K)
        one_hot = torch.zeros_like(pair_logits)
        one_hot.scatter_(-1, noised.labels.expand(len(logits), -1)[..., None], 1.0)
        losses = {
            "loss_ce": focal_loss(pair_logits, one_hot, alpha=self.alpha, gamma=self.gamma),
            **box_losses(boxes[:, noised.image, noised.slot], noised.boxes),
        }
        if count is None:
            count = count_per_rank(len(noised.labels), logits.device)
        return weigh_and_name(losses, self.weights, count, suffix="_dn")

    @torch.no_grad()
    def count_correct(self, logits: Tensor, noised: NoisedQueries) -> Tensor:
        """How many noised boxes the last layer gives their true class; () int64.

        Args:
            logits: (N, B, D, K), the denoising part.
            noised: what ``forward`` returned.
        """
        predicted = logits[-1, noised.image, noised.slot].argmax(-1)
        return (predicted == noised.labels).sum()

    def num_noised(self, counts: Sequence[int]) -> int:
        """How many noised boxes a batch gives whose images have these numbers of objects.

        With visible empty slots the number depends on which images share a batch, because the
        fullest one decides how many groups fit for all.
        """
        strides = self._slots_per_group(counts)
        chosen = [min(count, self.max_queries) for count in counts]
        return sum(n * self._groups(stride) for n, stride in zip(chosen, strides, strict=True))

    def draw_noise(self, num_objects: int, generator: torch.Generator) -> Noise:
        """Draw for one image with ``num_objects`` objects; ``generator`` is on the CPU."""
        shape = (self.num_groups, num_objects)
        return Noise(
            flip=torch.rand(shape, generator=generator),
            label=torch.randint(self.num_classes, shape, generator=generator),
            box=torch.rand(*shape, 4, generator=generator),
        )

    def _groups(self, num_objects: int) -> int:
        """Groups that ``max_queries`` leaves for an image."""
        return min(self.num_groups, max(1, self.max_queries // max(num_objects, 1)))

    def _place(self, counts: Sequence[int], seeds: Sequence[int]) -> _Placement:
        """Give each noised box of each image a slot; everything stays on the CPU."""
        parts: list[tuple[Tensor, ...]] = []
        strides = self._slots_per_group(counts)
        offset = 0
        for image, (count, stride, seed) in enumerate(zip(counts, strides, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            noise = self.draw_noise(count, generator)
            chosen = torch.arange(count)
            if count > self.max_queries:
                chosen = torch.randperm(count, generator=generator)[: self.max_queries]
            groups = self._groups(stride)
            group = torch.arange(groups)[:, None].expand(-1, len(chosen))
            slot = group * stride + torch.arange(len(chosen))
            fields = (torch.full_like(slot, image), slot, group, (chosen + offset).expand_as(slot))
            draws = (x[:groups, chosen].flatten(0, 1) for x in (noise.flip, noise.label, noise.box))
            parts.append((*(field.flatten() for field in fields), *draws))
            offset += count
        image_M, slot_M, group_M, source_M, *draws_M = map(torch.cat, zip(*parts, strict=True))
        num_slots = max(stride * self._groups(stride) for stride in strides)
        if self.mask_empty_slots:
            group_BD = torch.full((len(counts), num_slots), _EMPTY)
            group_BD[image_M, slot_M] = group_M
        else:
            group_BD = (torch.arange(num_slots) // max(strides[0], 1)).expand(len(counts), -1)
        return _Placement(image_M, slot_M, source_M, Noise(*draws_M), group_BD)

    def _slots_per_group(self, counts: Sequence[int]) -> list[int]:
        """Slots of one group of each image; as published all have those of the fullest."""
        if self.mask_empty_slots:
            return [min(count, self.max_queries) for count in counts]
        return [max(counts)] * len(counts)

    def _add_noise(self, labels: Tensor, boxes: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """Noise (M,) labels and (M, 4) boxes; sides stay non-negative, values in [0, 1]."""
        device = labels.device
        flipped = noise.flip.to(device) < self.label_noise
        labels = torch.where(flipped, noise.label.to(device), labels)
        reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=-1) * self.box_noise
        return labels, (boxes + (noise.box.to(boxes) * 2 - 1) * reach).clamp(0, 1)

    def _embed(self, labels: Tensor) -> Tensor:
        """(M,) labels -> (M, C) content."""
        content = self.label_embed(labels)
        return F.pad(content, (0, 1), value=1.0) if self.indicator else content


def _attention_mask(group_BD: Tensor, num_matching: int) -> Tensor:
    """(B, D + Q, D + Q) bool, True = blocked, from the group of each denoising slot."""
    batch, num_slots = group_BD.shape
    matching = group_BD.new_full((batch, num_matching), _MATCHING)
    seeing = torch.cat([group_BD, matching], dim=1)
    blocked = seeing[:, :, None] != group_BD[:, None, :]
    blocked |= (group_BD == _EMPTY)[:, None, :]
    return torch.cat(
        [blocked, blocked.new_zeros(batch, num_slots + num_matching, num_matching)], dim=-1
    )
