"""Which images make up which batch: endless, resumable, and the same for every world size."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

from torch.utils.data import Sampler

from .seeding import stable_seed


@dataclass(eq=False)
class EndlessBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields, without end, this rank's share of each global batch as (epoch, index) keys.

    The global batches of an epoch depend on `seed` and the epoch only. What is left over at
    the end of an epoch is dropped, as in the published recipe; another epoch leaves out others.

    With `groups`, images of one group share a batch; the remainders of the groups are joined
    to mixed batches at the end of the epoch, so that an epoch has equally many batches always.

    Args:
        num_images: size of the data set.
        total_batch_size: images per step over all ranks.
        seed: of the order.
        rank: this process, in [0, world_size).
        world_size: number of processes; rank r gets images r, r + world_size, ... of a batch. The
            shares may differ by one image.
        start_iteration: number of global batches to skip, over all epochs; for resuming.
        groups: one hashable value per image, None = no grouping.

    Raises:
        ValueError: a rank would get no image of a batch, or an epoch would have no batch.
    """

    num_images: int
    total_batch_size: int
    _: KW_ONLY
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start_iteration: int = 0
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        images, batch, ranks = self.num_images, self.total_batch_size, self.world_size
        if batch < ranks:
            raise ValueError(
                f"total_batch_size={batch} leaves some of {ranks} processes without an image; set "
                f"dataloader.train.total_batch_size={ranks} or higher"
            )
        if images < batch:
            raise ValueError(
                f"the training set has {images} image(s), fewer than one batch of {batch}; set "
                f"dataloader.train.total_batch_size={images} or lower"
            )

    @property
    def iterations_per_epoch(self) -> int:
        """Global batches per epoch."""
        return self.num_images // self.total_batch_size

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """All global batches of an epoch, as image indices."""
        order = list(range(self.num_images))
        random.Random(stable_seed(self.seed, epoch)).shuffle(order)
        if self.groups is None:
            return self._full_batches(order)
        return self._grouped_batches(order, self.groups)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skipped = divmod(self.start_iteration, self.iterations_per_epoch)
        while True:
            for batch in self.epoch_batches(epoch)[skipped:]:
                yield [(epoch, index) for index in batch[self.rank :: self.world_size]]
            epoch, skipped = epoch + 1, 0

    def _full_batches(self, order: Sequence[int]) -> list[list[int]]:
        size = self.total_batch_size
        return [list(order[i : i + size]) for i in range(0, len(order) - size + 1, size)]

    def _grouped_batches(self, order: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
        waiting: dict[int, list[int]] = {}
        batches = []
        for index in order:
            group = waiting.setdefault(groups[index], [])
            group.append(index)
            if len(group) == self.total_batch_size:
                batches.append(waiting.pop(groups[index]))
        remainders = [index for group in waiting.values() for index in group]
        return batches + self._full_batches(remainders)
