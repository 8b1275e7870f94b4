"""Data loaders for training and evaluation; every batch is a plain list of samples."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any, get_args

import torch
from torch.utils.data import DataLoader

from dn_detr.distributed import rank, world_size
from dn_detr.errors import UserError
from dn_detr.signals import STOP_SIGNALS

from .coco import CocoDetection
from .errors import DatasetError
from .packing import REMEDY, pack, unpack
from .samplers import EndlessBatchSampler
from .skipping import OnError, SkipBrokenImages
from .transforms import Sample

_EXIT_TIMEOUT = 1  # seconds in which a worker that broke a connection has exited


class SampleLoader:
    """Batches, as lists of samples, through a `torch.utils.data.DataLoader`.

    Workers ignore stop signals. They live as long as an iterator: they are started by its first
    batch and killed when it is closed, deleted or abandoned at the exit of the process, also in the
    middle of an image.

    Args:
        dataset: its keys are what the sampler yields.
        num_workers: worker processes, at most one per core; 0 = load in this process.
        skip_seed: see `SkipBrokenImages`; None = an image that cannot be read is an error.
        **sampling: `batch_sampler`, or `sampler` and `batch_size`.

    Attributes:
        dataset, batch_sampler, sampler, batch_size: as given; the last two are torch's defaults
            where there is a `batch_sampler`.

    Raises:
        DatasetError: while iterating: an image cannot be read, or a worker died. It is raised when
            the next batch is asked for, after at most 5 seconds.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        num_workers: int,
        skip_seed: int | None = None,
        **sampling: Any,
    ) -> None:
        self.dataset = dataset
        self._loader: DataLoader[Sample] = DataLoader(
            dataset if skip_seed is None else SkipBrokenImages(dataset, skip_seed),
            num_workers=min(num_workers, available_cores()),
            collate_fn=pack if num_workers else list,
            worker_init_fn=_start_worker,
            # Without a generator of its own DataLoader draws a seed for its workers from torch's
            # global one. Samples have their own seeds: the value does not matter, the draw would.
            generator=torch.Generator(),
            **sampling,
        )
        self.batch_sampler = self._loader.batch_sampler
        self.sampler = self._loader.sampler
        self.batch_size = self._loader.batch_size

    def __len__(self) -> int:
        """Number of batches, of a loader that ends."""
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        others = set(active_children())
        try:
            with _signals_of_workers_blocked():
                batches = iter(self._loader)
        except OSError as error:
            raise DatasetError(
                f"the workers of a loader cannot start: {error}. {REMEDY}"
            ) from error
        workers = set(active_children()) - others
        # With this priority it runs at the exit of the process before multiprocessing waits for
        # workers, which could take for ever.
        kill_workers = Finalize(None, _kill, args=(workers,), exitpriority=0)
        try:
            yield from map(unpack, batches) if self._loader.num_workers else batches
        except (RuntimeError, OSError, EOFError) as error:
            # A death shows itself as many errors, some of them before the process has exited.
            ended = wait([worker.sentinel for worker in workers], _EXIT_TIMEOUT)
            dead = [worker for worker in workers if worker.sentinel in ended]
            if not dead:
                raise
            for worker in dead:
                worker.join()
            deaths = ", ".join(f"pid {worker.pid}: exit code {worker.exitcode}" for worker in dead)
            raise DatasetError(
                f"a worker process of the data loader died ({deaths}). -9 most often means that"
                " memory ran out: lower num_workers or dataloader.image_scale, or give the job"
                " more; -7 that shared memory is full: enlarge /dev/shm (docker run"
                " --shm-size=8g); 1 may mean that it may open too few files: raise ulimit -n."
                " With num_workers=0 the error appears in the main process"
            ) from error
        finally:
            kill_workers()


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
) -> SampleLoader:
    """Endless loader of this rank's share of each training batch: images r, r + world, ...

    The shares may differ by one image. Its iterator never stops, one serves the whole run.
    `loader.batch_sampler` is the `EndlessBatchSampler`, with `iterations_per_epoch`.

    Args:
        dataset: training set.
        total_batch_size: images per step over all ranks, at least one for each.
        num_workers: worker processes of this rank, at most one per core; 0 = load in this process.
        limit: keep the first N images, None = all.
        aspect_ratio_grouping: batch wide images with wide ones and tall with tall ones: less
            padding, less mixing. The published recipe does not.
        on_error: "raise" stops at an image file that cannot be read; "skip" takes another image
            of the data set instead, see `SkipBrokenImages`.
        seed: of the order of images and of what is taken instead of broken ones.
        start_iteration: iterations that a resumed run has behind it.

    Raises:
        ValueError: `total_batch_size` is smaller than the number of processes or larger than
            the data set, or `on_error` is something else.
    """
    if on_error not in get_args(OnError):
        raise ValueError(
            f"dataloader.train.on_error={on_error!r}: expected {' or '.join(get_args(OnError))}"
        )
    dataset = _limited(dataset, limit)
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
    skip_seed = seed if on_error == "skip" else None
    return SampleLoader(
        dataset, num_workers=num_workers, skip_seed=skip_seed, batch_sampler=sampler
    )


def build_test_loader(
    dataset: CocoDetection,
    batch_size: int = 1,
    *,
    num_workers: int = 2,
    limit: int | None = None,
) -> SampleLoader:
    """Loader that visits every image once over all ranks: rank r gets images r, r + world, ...

    An image that cannot be read is always an error: metrics without it would be silently wrong.

    Args:
        dataset: test set.
        batch_size: images per step of this rank.
        num_workers: worker processes of this rank, at most one per core; 0 = load in this process.
        limit: keep the first N images, None = all.
    """
    dataset = _limited(dataset, limit)
    share = range(rank(), len(dataset), world_size())
    return SampleLoader(dataset, num_workers=num_workers, batch_size=batch_size, sampler=share)


def raise_open_file_limit() -> None:
    """Let this process and its workers open as many files as the system allows them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # of systems whose limit is "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_worker(_worker: int) -> None:
    """Leave signals to the main process; a loader's `worker_init_fn`.

    Ctrl-C and a scheduler's signals reach every process of a job, and the main process needs its
    workers to finish its step.
    """
    # A batch that cannot be sent would be waited for.
    Queue._on_queue_feeder_error = staticmethod(_exit_worker)  # type: ignore[attr-defined]
    signal.set_wakeup_fd(-1)  # that of the main process: it would be told of our signals
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _exit_worker(error: BaseException, _batch: object) -> None:
    print(f"a batch cannot be sent to the main process: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def _signals_of_workers_blocked() -> Iterator[None]:
    """Start workers within this context.

    A worker is born with the signal handlers of the main process and must not run them before
    `_start_worker`, so that stop signals wait. torch's handler of SIGCHLD is removed
    again: it raises wherever the main process happens to be, also while it saves a checkpoint.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(workers: set[BaseProcess]) -> None:
    """End workers, which have nothing to save, whatever they are doing."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def _limited(dataset: CocoDetection, limit: int | None) -> CocoDetection:
    if limit is None:
        return dataset
    if not hasattr(dataset, "subset"):
        raise UserError(
            f"limit={limit} needs a data set with a method subset(count); "
            f"{type(dataset).__name__} has none"
        )
    return dataset.subset(limit)
