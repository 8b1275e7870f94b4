"""Writing the checkpoints of a run, in the background if wished."""

from __future__ import annotations

import copy
import logging
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from .folders import (
    BEST_LINK,
    CHECKPOINTS_DIR,
    LAST_LINK,
    TRAINING_STATE_FILE,
    folder_name,
    move_into_place,
    partial_of,
    point_link,
    prune,
    remove_leftovers,
    require_writable,
)
from .manifest import CheckpointError, Manifest, flush_to_disk
from .shards import collect, hand_over, report_failure
from .snapshot import HostCopy, HostMemory, Snapshot
from .storage import record_metrics
from .tensor_files import shard_name, write_bytes, write_tensors

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one run.

    A checkpoint is written aside, every file is flushed to the disk, and the folder is renamed;
    then `checkpoints/last` points at it. So a kill or a full disk at any moment leaves the one
    before as it was. What cannot be written is not raised where it happens but kept for
    `failures()` and `wait()`: a training does not end because a disk is full for an hour.

    With `sharded` every process writes its share of the tensors to the same folder. All processes
    then call `save` for the same iterations in the same order with equal snapshots, and the call
    of process 0 has to end before the others call: put a barrier between the two. A refusal is
    raised on all of them alike, on process 0 before that barrier. The threads that write need no
    collectives. Otherwise process 0 writes alone and the calls of other processes do nothing.

    Args:
        output_dir: folder of the run; on a file system that all processes share if `sharded`.
        config: the resolved config as YAML text.
        class_names: class names of the training data; index = class.
        keep: number of newest checkpoints to keep, >= 1, besides the best; None keeps all.
        asynchronous: `save` returns when the state is copied to host memory, and a thread writes.
            The copy's memory is kept until `close`.
        sharded: every process writes a shard.
        rank: of this process.
        world_size: number of processes.
        shard_timeout: seconds for which process 0 waits for the shards of the others.

    Attributes:
        folder: of the checkpoints, `output_dir/checkpoints`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        config: str = "",
        class_names: Sequence[str] = (),
        keep: int | None = None,
        asynchronous: bool = True,
        sharded: bool = False,
        rank: int = 0,
        world_size: int = 1,
        shard_timeout: float = 600.0,
    ) -> None:
        self.folder = Path(output_dir) / CHECKPOINTS_DIR
        self._config = config
        self._class_names = list(class_names)
        self._keep = keep
        self._rank = rank
        self._shards = world_size if sharded else 1
        self._shard_timeout = shard_timeout
        self._memory = HostMemory()
        # Not a daemon: at the end of the program Python waits for it.
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._failures: deque[CheckpointError] = deque()
        self._latest: Path | None = None

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint that this writer has completed; None on other processes than 0."""
        return self._latest

    def require_writable(self) -> None:
        """Create the folder, and make sure that checkpoints can be written to it.

        Raises:
            CheckpointError: they cannot.
        """
        if self._rank == 0:
            require_writable(self.folder)

    def save(self, snapshot: Snapshot) -> None:
        """Copy the state of a training and write it; wait first for what is still being written.

        Args:
            snapshot: may change as soon as this returns.

        Raises:
            NonFiniteWeightsError: a weight or a number of the optimizer is NaN or infinite;
                nothing was written.
            CheckpointError: the training state holds what cannot be stored.
        """
        if self._rank >= self._shards:
            return
        self._finish_pending()
        content = self._memory.copy(snapshot, self._rank, self._shards)
        partial = partial_of(self._folder(snapshot.iteration))
        if self._rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                flush_to_disk(self.folder.parent)
                remove_leftovers(self.folder)
                partial.mkdir()
            except OSError as error:
                self._failures.append(self._failure(partial, error))
                return
        self._submit(lambda: self._write(content, partial))

    def record_evaluation(
        self, iteration: int, metrics: Mapping[str, Any], *, is_best: bool = False
    ) -> None:
        """Add the results of an evaluation to the checkpoint of its iteration, once that is saved.

        Args:
            iteration: of a checkpoint of this run.
            metrics: what JSON can hold.
            is_best: let `checkpoints/best` point at it, which keeps it.
        """
        if self._rank != 0:
            return
        results = copy.deepcopy(dict(metrics))
        self._submit(lambda: self._record(self._folder(iteration), results, is_best))

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            CheckpointError: something could not be written, and nobody has asked for it yet.
        """
        self._finish_pending()
        failures = self.failures()
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise CheckpointError("\n".join(map(str, failures)))

    def failures(self) -> list[CheckpointError]:
        """Return what could not be written since the last time this was asked."""
        # One by one, because the thread may add to them meanwhile.
        return [self._failures.popleft() for _ in range(len(self._failures))]

    def close(self) -> None:
        """Finish writing, end the thread, and log the failures that nobody has asked for.

        What process 0 waits for the others is bounded by `shard_timeout`.
        """
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._memory.release()
        for failure in self.failures():
            _logger.error("%s", failure)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _folder(self, iteration: int) -> Path:
        return self.folder / folder_name(iteration)

    def _submit(self, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except CheckpointError as error:
                self._failures.append(error)

        if self._thread is None:
            run()
            self._memory.release()
        else:
            self._pending = self._thread.submit(run)

    def _finish_pending(self) -> None:
        # There is one thread, so the last job is done when all are.
        if self._pending is not None:
            self._pending.result()

    def _write(self, content: HostCopy, partial: Path) -> None:
        try:
            digests = self._write_tensors(content, partial)
            if self._rank == 0:
                self._complete(content, partial, digests)
            else:
                hand_over(partial, self._rank, digests)
        except Exception as error:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                report_failure(partial, self._rank, error)
            raise self._failure(partial, error) from error

    def _write_tensors(self, content: HostCopy, partial: Path) -> dict[str, str]:
        names = {file: shard_name(file, self._rank, self._shards) for file in content.files}
        return {
            names[file]: write_tensors(partial / names[file], tensors)
            for file, tensors in content.files.items()
        }

    def _complete(self, content: HostCopy, partial: Path, digests: dict[str, str]) -> None:
        digests[TRAINING_STATE_FILE] = write_bytes(
            partial / TRAINING_STATE_FILE, content.training_state
        )
        digests |= collect(partial, self._shards, self._shard_timeout)
        files = dict(sorted(digests.items()))
        manifest = Manifest(
            content.iteration, content.epoch, files, self._config, self._class_names
        )
        manifest.write(partial)
        folder = self._folder(content.iteration)
        move_into_place(partial, folder)
        point_link(folder, LAST_LINK)
        self._latest = folder
        prune(folder, self._keep)

    def _record(self, folder: Path, metrics: dict[str, Any], is_best: bool) -> None:
        try:
            record_metrics(folder, metrics)
            if is_best:
                point_link(folder, BEST_LINK)
        except Exception as error:
            raise CheckpointError(
                f"{folder}: the results of its evaluation were not recorded: {error}"
            ) from error

    def _failure(self, partial: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{partial.parent}: checkpoint {partial.stem[1:]} was not saved: {error}; the ones "
            "before are untouched and the next save tries again: make sure that the folder can be "
            f"written to and that there is space{_free_space(partial.parent)}"
        )


def save_checkpoint(
    output_dir: str | Path,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    *,
    iteration: int,
    epoch: float,
    config: str = "",
    class_names: Sequence[str] = (),
    keep: int | None = None,
) -> Path:
    """Write one checkpoint of a run, as `CheckpointWriter` does, and return its folder.

    Args:
        output_dir: folder of the run.
        model_state: name -> tensor, any device.
        training_state: what `load_training_state` will return: "optimizer" and "ema" if there are
            such, and other entries; see `Snapshot`.
        iteration: optimizer steps done; names the folder.
        epoch: the same in epochs.
        config: the resolved config as YAML text.
        class_names: class names of the training data.
        keep: number of newest checkpoints to keep, >= 1; None keeps all.

    Raises:
        CheckpointError: it cannot be written, or holds NaN or infinity.
    """
    rest = dict(training_state)
    optimizer, ema = rest.pop("optimizer", {}), rest.pop("ema", None)
    with CheckpointWriter(
        output_dir, config=config, class_names=class_names, keep=keep, asynchronous=False
    ) as writer:
        writer.save(Snapshot(iteration, epoch, model_state, optimizer, rest, ema))
        writer.wait()
    assert writer.latest is not None
    return writer.latest


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
