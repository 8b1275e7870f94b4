"""Query denoising: noised ground-truth boxes as extra queries, trained to restore the originals.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2022, section 4
(https://arxiv.org/abs/2203.01305). Usable in any detector whose decoder takes an attention mask;
see docs/denoising.md. It differs from the published code where that made a step depend on which
images share a batch: slots that stay empty are masked, each image draws its own noise, and the
number of queries is bounded.

Legend: B batch, D denoising slots, Q matching queries, C channels, P coordinates of a position,
K classes, M noised boxes of the batch, n objects of one image, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairs import Outputs, Pairs, Targets

Embed = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Labels (M,), boxes (M, 4) and groups (M,) -> content (M, C) and position (M, P) of queries."""

_EMPTY = -1  # group of a slot that holds no noised box
_MATCHING = -2  # group of a matching query


@dataclass(frozen=True)
class Noise:
    """The random draws of one image: G repetitions of its n noised boxes, all on the CPU.

    Attributes:
        flip: (G, n) in [0, 1); a label is replaced where this is less than the label noise.
        label: (G, n) int64 in [0, K), the replacement.
        box: (G, n, 4) in [0, 1); 0.5 leaves a coordinate where it is.
    """

    flip: Tensor
    label: Tensor
    box: Tensor


@dataclass(frozen=True)
class NoisedBoxes:
    """The M noised boxes of a batch, and their slots among the decoder's queries.

    Attributes:
        labels: (M,) int64, noised.
        boxes: (M, 4) noised (cx, cy, w, h) in [0, 1].
        image: (M,) int64, index in [0, B).
        slot: (M,) int64, index in [0, D).
        group: (M,) int64, index in [0, G).
        group_of_slot: (B, D) int64, the group whose queries see each slot; -1 for an empty slot
            that is hidden.
        pairs: which of them is to predict which object; the others are to predict nothing.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    slot: Tensor
    group: Tensor
    group_of_slot: Tensor
    pairs: Pairs


@dataclass(frozen=True)
class NoisedQueries:
    """Denoising queries before the matching queries, and what they are to predict.

    Attributes:
        content: (B, D + Q, C).
        position: (B, D + Q, P).
        attention_mask: (B, D + Q, D + Q) bool, True = blocked: a denoising query is seen by its
            own group only, an empty slot by no query.
        num_slots: D, 0 if no image has an object.
        pairs: of the denoising queries and the objects.
    """

    content: Tensor
    position: Tensor
    attention_mask: Tensor
    num_slots: int
    pairs: Pairs

    def split(self, outputs: Outputs) -> tuple[Outputs, Outputs]:
        """Separate predictions (N, B, D + Q, ...).

        Returns:
            Those of the denoising queries (N, B, D, ...) and of the matching queries
            (N, B, Q, ...).
        """
        denoising = {name: x[:, :, : self.num_slots] for name, x in outputs.items()}
        matching = {name: x[:, :, self.num_slots :] for name, x in outputs.items()}
        return denoising, matching


class QueryDenoising(nn.Module):
    """Makes noised labels and boxes of the ground truth, their slots, attention mask and pairs.

    Args:
        num_classes: K.
        embed: makes content and position of queries of noised labels, boxes and groups, such as
            `BoxQueryEmbedding`; None where only `noise` is called.
        num_groups: how often each object is noised; groups do not see each other.
        label_noise: probability that a label is replaced by a random one.
        box_noise: largest shift of a centre in half box sizes, and largest change of a side in
            box sizes.
        max_queries: bound of D. An image with n objects gets min(num_groups, max_queries // n)
            groups; with n > max_queries one group of a random choice of its objects. The default
            leaves all five groups to every image of up to 100 objects, as published. (Where
            empty slots are visible, a group of the fullest image is never cut.)
        mask_empty_slots: hide the slots that images with fewer objects leave empty. False is the
            published behaviour: a group has as many slots as the fullest image has objects, and
            its queries see the empty ones (all-zero content, a box of half the image).

    Attributes:
        num_negatives: noised boxes that each object has in a group beside the one that is to
            become it; these are to predict nothing. 0 but in a subclass (contrastive denoising),
            whose `add_noise` tells them apart.

    Raises:
        ValueError: a number of groups or queries below 1, or a probability outside [0, 1].
    """

    num_negatives = 0

    def __init__(
        self,
        num_classes: int,
        embed: Embed | None = None,
        *,
        num_groups: int = 5,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
        max_queries: int = 500,
        mask_empty_slots: bool = True,
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
        self.embed = embed
        self.num_groups = num_groups
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.max_queries = max_queries
        self.mask_empty_slots = mask_empty_slots

    def forward(
        self,
        targets: Targets,
        content: Tensor,
        position: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> NoisedQueries:
        """Put noised ground truth before the matching queries.

        Args:
            targets: see `noise`.
            content: (B, Q, C) of the matching queries.
            position: (B, Q, P) of the matching queries.
            seeds: see `noise`.

        Raises:
            ValueError: not one target (and seed) per image of `content`, or no `embed`.
        """
        if len(targets) != len(content):
            raise ValueError(f"{len(targets)} targets for a batch of {len(content)} images")
        if self.embed is None:
            raise ValueError("QueryDenoising makes no queries without the argument `embed`")
        noised = self.noise(targets, seeds, dtype=position.dtype)
        group_BD = noised.group_of_slot
        num_slots = group_BD.shape[1]
        joint = []
        embedded = self.embed(noised.labels, noised.boxes, noised.group)
        for x, matching in zip(embedded, (content, position), strict=True):
            slots = matching.new_zeros(len(targets), num_slots, matching.shape[-1])
            slots[noised.image, noised.slot] = x.to(matching.dtype)
            joint.append(torch.cat([slots, matching], dim=1))
        seeing = F.pad(group_BD, (0, content.shape[1]), value=_MATCHING)
        blocked = seeing[:, :, None] != group_BD[:, None, :]
        blocked |= (group_BD == _EMPTY)[:, None, :]
        mask = F.pad(blocked, (0, content.shape[1]), value=False)
        return NoisedQueries(joint[0], joint[1], mask, num_slots, noised.pairs)

    def noise(
        self,
        targets: Targets,
        seeds: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> NoisedBoxes:
        """Noise the ground truth.

        Args:
            targets: per image `labels` (n,) int64 in [0, K) and `boxes` (n, 4) as (cx, cy, w, h)
                in [0, 1].
            seeds: one integer per image; its noise is a function of it. By default they are drawn
                from torch's global generator.
            dtype: of the noised boxes.
        """
        if seeds is None:
            seeds = torch.randint(2**62, (len(targets),)).tolist()
        # Slots and draws are made on the CPU: nothing waits for the device.
        counts = [len(target["labels"]) for target in targets]
        sizes = self._slots_per_group(counts)
        parts: list[tuple[Tensor, ...]] = []
        offset = 0
        for image, (count, size, seed) in enumerate(zip(counts, sizes, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            draws = self.draw_noise(count * self._copies, generator)
            chosen = torch.arange(count)
            if count > self._most_objects:
                chosen = torch.randperm(count, generator=generator)[: self._most_objects]
            entries = torch.cat([chosen + copy * count for copy in range(self._copies)])
            groups = self._groups(size)
            group = torch.arange(groups)[:, None].expand(-1, len(entries))
            copies = torch.arange(self._copies)[:, None] * (size // self._copies)
            slot = group * size + (copies + torch.arange(len(chosen))).flatten()
            target = (chosen + offset).repeat(self._copies).expand_as(slot)
            negative = (entries >= count).expand_as(slot)
            fields = (torch.full_like(slot, image), slot, group, target, negative)
            noise = (x[:groups, entries] for x in (draws.flip, draws.label, draws.box))
            parts.append(tuple(x.flatten(0, 1) for x in (*fields, *noise)))
            offset += count
        placed = [torch.cat(x) for x in zip(*parts, strict=True)]
        image_M, slot_M, group_M, _, negative_M, *_ = placed
        num_slots = max(size * self._groups(size) for size in sizes)
        if self.mask_empty_slots:
            group_BD = torch.full((len(counts), num_slots), _EMPTY)
            group_BD[image_M, slot_M] = group_M
        else:
            group_BD = (torch.arange(num_slots) // max(sizes[0], 1)).expand(len(counts), -1)
        positives = (~negative_M).nonzero()[:, 0]

        device = targets[0]["labels"].device
        image_M, slot_M, group_M, target_M, negative_M, *draws_M = (x.to(device) for x in placed)
        labels = torch.cat([t["labels"] for t in targets])[target_M]
        boxes = torch.cat([t["boxes"] for t in targets])[target_M].to(dtype)
        labels, boxes = self.add_noise(labels, boxes, Noise(*draws_M), negative_M)
        image_P, slot_P, target_P = (x[positives.to(device)] for x in (image_M, slot_M, target_M))
        pairs = Pairs(image_P, slot_P[None], target_P[None], classified=(image_M, slot_M))
        return NoisedBoxes(labels, boxes, image_M, slot_M, group_M, group_BD.to(device), pairs)

    def add_noise(
        self, labels: Tensor, boxes: Tensor, noise: Noise, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise labels and boxes; sides stay non-negative, values in [0, 1].

        Args:
            labels: (M,) int64.
            boxes: (M, 4) as (cx, cy, w, h) in [0, 1].
            noise: draws for them, without the group dimension.
            negative: (M,) bool, True = to predict nothing; without effect on this noise.
        """
        labels = torch.where(noise.flip < self.label_noise, noise.label, labels)
        reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=-1) * self.box_noise
        return labels, (boxes + (noise.box.to(boxes) * 2 - 1) * reach).clamp(0, 1)

    def draw_noise(self, num_boxes: int, generator: torch.Generator) -> Noise:
        """Draw for one image with `num_boxes` boxes to noise; `generator` is on the CPU."""
        shape = (self.num_groups, num_boxes)
        return Noise(
            flip=torch.rand(shape, generator=generator),
            label=torch.randint(self.num_classes, shape, generator=generator),
            box=torch.rand(*shape, 4, generator=generator),
        )

    def num_noised(self, counts: Sequence[int]) -> int:
        """Number of pairs of a batch whose images have these numbers of objects.

        With visible empty slots the number depends on which images share a batch, because the
        fullest one decides how many groups fit for all.
        """
        sizes = self._slots_per_group(counts)
        chosen = [min(count, self._most_objects) for count in counts]
        return sum(n * self._groups(size) for n, size in zip(chosen, sizes, strict=True))

    @property
    def _copies(self) -> int:
        """Noised boxes of an object in a group."""
        return 1 + self.num_negatives

    @property
    def _most_objects(self) -> int:
        """Objects of an image that are noised."""
        return max(1, self.max_queries // self._copies)

    def _slots_per_group(self, counts: Sequence[int]) -> list[int]:
        """Slots of one group of each image; as published all have those of the fullest."""
        if self.mask_empty_slots:
            return [min(count, self._most_objects) * self._copies for count in counts]
        return [max(counts) * self._copies] * len(counts)

    def _groups(self, slots_per_group: int) -> int:
        """Groups that `max_queries` leaves for an image."""
        return min(self.num_groups, max(1, self.max_queries // max(slots_per_group, 1)))
