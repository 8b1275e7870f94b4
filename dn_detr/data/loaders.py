"""Data loaders for training and evaluation; every batch is a plain list of samples."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import DataLoader

from .coco import CocoDetection, Sample
from .samplers import EndlessBatchSampler, rank_and_world_size


def build_train_loader(
    dataset: CocoDetection,
    total_batch_size: int,
    *,
    num_workers: int = 2,
    limit: int | None = None,
    aspect_ratio_grouping: bool = False,
    seed: int = 0,
    start_iteration: int = 0,
) -> DataLoader[Sample]:
    """Endless loader of this rank's share of each training batch.

    Its iterator never stops, one serves the whole run. ``loader.batch_sampler`` is the
    ``EndlessBatchSampler``, with ``iterations_per_epoch``.

    Args:
        dataset: training set.
        total_batch_size: images per step over all ranks.
        num_workers: worker processes of this rank, at most one per core; 0 = load in this process.
        limit: keep the first N images, None = all.
        aspect_ratio_grouping: batch wide images with wide ones and tall with tall ones: less
            padding, less mixing. The published recipe does not.
        seed: of the order of images.
        start_iteration: iterations that a resumed run has behind it.

    Raises:
        ValueError: ``total_batch_size`` is no multiple of the number of processes or larger than
            the data set.
    """
    dataset = dataset if limit is None else dataset.subset(limit)
    rank, world_size = rank_and_world_size()
    sampler = EndlessBatchSampler(
        len(dataset),
        total_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        start_iteration=start_iteration,
        groups=[int(width > height) for height, width in dataset.image_sizes]
        if aspect_ratio_grouping
        else None,
    )
    return DataLoader(dataset, batch_sampler=sampler, **_common_settings(num_workers))


def build_test_loader(
    dataset: CocoDetection,
    batch_size: int = 1,
    *,
    num_workers: int = 2,
    limit: int | None = None,
) -> DataLoader[Sample]:
    """Loader that visits every image once over all ranks: rank r gets images r, r + world, ...

    Args:
        dataset: test set.
        batch_size: images per step of this rank.
        num_workers: worker processes of this rank, at most one per core; 0 = load in this process.
        limit: keep the first N images, None = all.
    """
    dataset = dataset if limit is None else dataset.subset(limit)
    rank, world_size = rank_and_world_size()
    share = range(rank, len(dataset), world_size)
    return DataLoader(dataset, batch_size, sampler=share, **_common_settings(num_workers))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def _common_settings(num_workers: int) -> dict[str, Any]:
    # DataLoader draws a seed for its workers from torch's global generator unless it gets one of
    # its own; samples have their own seeds, so the value does not matter, but the draw would.
    # DataLoader itself limits its workers to one thread each.
    num_workers = min(num_workers, available_cores())
    return {
        "num_workers": num_workers,
        "collate_fn": _as_list,
        "persistent_workers": num_workers > 0,
        "generator": torch.Generator(),
    }
