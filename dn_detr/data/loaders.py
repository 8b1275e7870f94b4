"""Data loaders for training and evaluation; every batch is a plain list of samples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader, Dataset

from dn_detr.distributed import rank, world_size

from .coco import CocoDetection, Sample
from .samplers import EndlessBatchSampler
from .skipping import OnError, SkipBrokenImages
from .workers import JournaledDataset, WorkerWatch, serve_the_parent


class WatchedLoader(DataLoader[Sample]):
    """A ``DataLoader`` that survives signals to its workers and reports what killed one.

    Every batch is a list of samples. Workers are started by the first ``iter`` and live as long
    as the loader.

    Args:
        dataset: its keys are what the sampler yields.
        num_workers: worker processes, at most one per core; 0 = load in this process.
        skip_seed: see ``SkipBrokenImages``; None = an image that cannot be read is an error.
        **sampling: ``batch_sampler``, or ``sampler`` and ``batch_size``.

    Raises:
        DatasetError: while iterating: an image cannot be read, or a worker died. The message has
            the file, the process, how it died and what helps.
    """

    def __init__(
        self,
        dataset: CocoDetection,
        *,
        num_workers: int,
        skip_seed: int | None = None,
        **sampling: Any,
    ) -> None:
        # DataLoader draws a seed for its workers from torch's global generator unless it gets one
        # of its own; samples have their own seeds, so the value does not matter, but the draw
        # would. DataLoader itself limits its workers to one thread each.
        settings = dict(sampling, collate_fn=_as_list, generator=torch.Generator())
        source: Dataset[Sample] = dataset
        num_workers = min(num_workers, available_cores())
        self._watch = WorkerWatch(dataset, num_workers) if num_workers else None
        if self._watch is not None:
            source = JournaledDataset(source, self._watch.journal)
            settings.update(
                num_workers=num_workers,
                persistent_workers=True,
                worker_init_fn=serve_the_parent,
                multiprocessing_context=self._watch.context,
            )
        if skip_seed is not None:
            source = SkipBrokenImages(source, skip_seed)
        super().__init__(dataset, **settings)
        # The attributes are those of the data set; what is read goes through the two wrappers.
        self._reader: DataLoader[Sample] = DataLoader(source, **settings)

    def __iter__(self) -> Iterator[list[Sample]]:  # type: ignore[override]
        if self._watch is None:
            return iter(self._reader)
        with self._watch.reporting(), self._watch.starting():
            batches = iter(self._reader)
        # torch offers no public way to this queue
        self._watch.begin(batches._worker_result_queue)  # type: ignore[attr-defined]
        return self._watched(batches, self._watch)

    def end_workers(self) -> None:
        """End the workers, whatever they are doing; the loader is of no use any more.

        Without this, torch waits 5 seconds for each of them whose image hangs.
        """
        if self._watch is not None:
            self._watch.end()

    def _watched(
        self, batches: Iterator[list[Sample]], watch: WorkerWatch
    ) -> Iterator[list[Sample]]:
        while True:
            with watch.reporting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def build_train_loader(
    dataset: CocoDetection,
    total_batch_size: int,
    *,
    num_workers: int = 2,
    limit: int | None = None,
    aspect_ratio_grouping: bool = False,
    on_error: OnError = "raise",
    seed: int = 0,
    start_iteration: int = 0,
) -> DataLoader[Sample]:
    """Endless loader of this rank's share of each training batch: images r, r + world, ...

    The shares may differ by one image. Its iterator never stops, one serves the whole run.
    ``loader.batch_sampler`` is the ``EndlessBatchSampler``, with ``iterations_per_epoch``.

    Args:
        dataset: training set.
        total_batch_size: images per step over all ranks, at least one for each.
        num_workers: worker processes of this rank, at most one per core; 0 = load in this process.
        limit: keep the first N images, None = all.
        aspect_ratio_grouping: batch wide images with wide ones and tall with tall ones: less
            padding, less mixing. The published recipe does not.
        on_error: "raise" stops at an image file that cannot be read; "skip" takes another image
            of the data set instead, see ``SkipBrokenImages``.
        seed: of the order of images and of what is taken instead of broken ones.
        start_iteration: iterations that a resumed run has behind it.

    Raises:
        ValueError: ``total_batch_size`` is smaller than the number of processes or larger than
            the data set, or ``on_error`` is something else.
    """
    if on_error not in get_args(OnError):
        raise ValueError(
            f"dataloader.train.on_error={on_error!r}: expected {' or '.join(get_args(OnError))}"
        )
    dataset = dataset if limit is None else dataset.subset(limit)
    sampler = EndlessBatchSampler(
        len(dataset),
        total_batch_size,
        seed=seed,
        rank=rank(),
        world_size=world_size(),
        start_iteration=start_iteration,
        groups=[int(width > height) for height, width in dataset.image_sizes]
        if aspect_ratio_grouping
        else None,
    )
    return WatchedLoader(
        dataset,
        num_workers=num_workers,
        skip_seed=seed if on_error == "skip" else None,
        batch_sampler=sampler,
    )


def build_test_loader(
    dataset: CocoDetection,
    batch_size: int = 1,
    *,
    num_workers: int = 2,
    limit: int | None = None,
) -> DataLoader[Sample]:
    """Loader that visits every image once over all ranks: rank r gets images r, r + world, ...

    An image that cannot be read is always an error: metrics without it would be silently wrong.

    Args:
        dataset: test set.
        batch_size: images per step of this rank.
        num_workers: worker processes of this rank, at most one per core; 0 = load in this process.
        limit: keep the first N images, None = all.
    """
    dataset = dataset if limit is None else dataset.subset(limit)
    share = range(rank(), len(dataset), world_size())
    return WatchedLoader(dataset, num_workers=num_workers, batch_size=batch_size, sampler=share)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples
