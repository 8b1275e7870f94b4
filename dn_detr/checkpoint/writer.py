"""Writing the checkpoints of a run, in the background if wished."""

from __future__ import annotations

import copy
import logging
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from .folders import (
    BEST_LINK,
    CHECKPOINTS_DIR,
    EMA_FILE,
    LAST_LINK,
    MODEL_FILE,
    TRAINING_STATE_FILE,
    folder_name,
    move_into_place,
    partial_of,
    point_link,
    prune,
    remove_leftovers,
)
from .manifest import CheckpointError, Manifest, flush_to_disk
from .snapshot import HostMemory, Snapshot
from .storage import record_metrics
from .tensor_files import write_state, write_tensors

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class CheckpointWriter:
    """Writes the checkpoints of one run.

    A checkpoint is written aside, every file is flushed to the disk, and the folder is renamed;
    then `checkpoints/last` points at it. So a kill or a full disk at any moment leaves the one
    before as it was. What cannot be written is not raised where it happens but kept for
    `failures()` and `wait()`: a training does not end because a disk is full for an hour.

    The main process writes alone; on other ranks every method returns without doing anything.

    Args:
        output_dir: folder of the run.
        config: the resolved config as YAML text.
        class_names: class names of the training data; index = class.
        keep: number of newest checkpoints to keep, >= 1, besides the best; None keeps all.
        asynchronous: `save` returns when the state is copied to host memory, and a thread writes.
            The copy's memory is kept until `close`.
        rank: of this process.

    Attributes:
        folder: of the checkpoints, `output_dir/checkpoints`.
        latest: the newest checkpoint that this writer has completed; None on ranks > 0.
    """

    output_dir: str | Path
    _: KW_ONLY
    config: str = ""
    class_names: Sequence[str] = ()
    keep: int | None = None
    asynchronous: bool = True
    rank: int = 0

    def __post_init__(self) -> None:
        self.folder = Path(self.output_dir) / CHECKPOINTS_DIR
        self._memory = HostMemory()
        # Not a daemon: at the end of the program Python waits for it.
        self._thread = ThreadPoolExecutor(1, "checkpoint") if self.asynchronous else None
        self._pending: Future[None] | None = None
        self._failures: deque[CheckpointError] = deque()
        self.latest: Path | None = None

    def require_writable(self) -> None:
        """Create the folder, and make sure that checkpoints and links can lie there.

        Raises:
            CheckpointError: they cannot.
        """
        if self.rank != 0:
            return
        trial = partial_of(self.folder / "trial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial.unlink(missing_ok=True)
            trial.symlink_to(LAST_LINK)
            trial.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: checkpoints cannot be written there: {error.strerror}; it has to "
                "be a folder with permission to write, on a file system that has symbolic links"
            ) from error

    def save(self, snapshot: Snapshot) -> None:
        """Copy the state of a training and write it; wait first for what is still being written.

        Args:
            snapshot: may change as soon as this returns.

        Raises:
            NonFiniteWeightsError: a weight or a number of the optimizer is NaN or infinite;
                nothing was written.
            CheckpointError: the training state holds what cannot be stored.
        """
        if self.rank != 0:
            return
        self._finish_pending()
        copied = self._memory.copy(snapshot)
        self._submit(lambda: self._write(copied, self._folder(snapshot.iteration)))

    def record_evaluation(
        self, iteration: int, metrics: Mapping[str, Any], *, is_best: bool = False
    ) -> None:
        """Add the results of an evaluation to the checkpoint of its iteration, once that is saved.

        Args:
            iteration: of a checkpoint of this run.
            metrics: what JSON can hold.
            is_best: let `checkpoints/best` point at it, which keeps it.
        """
        if self.rank != 0:
            return
        results = copy.deepcopy(dict(metrics))
        self._submit(lambda: self._record(self._folder(iteration), results, is_best))

    def wait(self) -> None:
        """Return when everything is on the disk.

        Raises:
            CheckpointError: something could not be written, and was not reported yet.
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
        """Finish writing, end the thread, and log the failures that were not asked for."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._memory.release()
        for failure in self.failures():
            logger.error("%s", failure)

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

    def _write(self, snapshot: Snapshot, folder: Path) -> None:
        partial = partial_of(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flush_to_disk(self.folder.parent)
            remove_leftovers(self.folder)
            partial.mkdir()
            files = {}
            if snapshot.ema is not None:
                files[EMA_FILE] = write_tensors(partial / EMA_FILE, snapshot.ema)
            files[MODEL_FILE] = write_tensors(partial / MODEL_FILE, snapshot.model)
            state = {**snapshot.training_state, "optimizer": snapshot.optimizer}
            files[TRAINING_STATE_FILE] = write_state(partial / TRAINING_STATE_FILE, state)
            names = list(self.class_names)
            manifest = Manifest(snapshot.iteration, snapshot.epoch, files, self.config, names)
            manifest.write(partial)
            move_into_place(partial, folder)
            point_link(folder, LAST_LINK)
            self.latest = folder
            prune(folder, self.keep)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{self.folder}: checkpoint {folder.name} was not saved: {error}; the ones before "
                "are untouched and the next save tries again: make sure that the folder can be "
                f"written to and that there is space{_free_space(self.folder)}"
            ) from error

    def _record(self, folder: Path, metrics: dict[str, Any], is_best: bool) -> None:
        try:
            record_metrics(folder, metrics)
            if is_best:
                point_link(folder, BEST_LINK)
        except Exception as error:
            raise CheckpointError(
                f"{folder}: the results of its evaluation were not recorded: {error}"
            ) from error


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
