"""Where the log records of a run go: metrics.jsonl, TensorBoard and Weights & Biases.

metrics.jsonl is the record of a run: nothing is lost from it while the run lives, and a resumed
run continues it exactly. The other two are callbacks for looking on. None stops a training that
works: a full disk holds back records of metrics.jsonl until there is room, and a callback for
looking on that fails is switched off with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dn_detr.checkpoint.manifest import flush_to_disk
from dn_detr.distributed import is_main
from dn_detr.errors import UserError

from .callbacks import Callback
from .metrics import Record
from .settings import WandbSettings

if TYPE_CHECKING:
    from .run_state import RunState

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_FILE = "wandb_run_id.txt"

logger = logging.getLogger(__name__)


class WriterError(UserError):
    """A writer cannot be opened; the message names the file or setting and the remedy."""


class MetricsFile:
    """Writes `metrics.jsonl`; records that an abandoned run wrote after `iteration` are removed.

    A record that cannot be written (the disk is full) is kept in memory and written before the next
    one; the file never holds a part of a line for longer than the attempt. A file that is removed
    or renamed is replaced by a new one, for the records from then on.

    Args:
        folder: output folder of the run.
        iteration: the run continues after this one; 0 for a new run.
        is_evaluated: whether records of the evaluation at `iteration` are kept.
        expected: how many records of the training there were at `iteration`; with fewer in the file
            a warning is logged.

    Attributes:
        records: of the training, from its begin.
        was_removed: whether the file lacks records because it was removed or renamed.

    Raises:
        WriterError: the file cannot be read or written when the run starts.
    """

    def __init__(
        self, folder: Path, iteration: int, *, is_evaluated: bool = False, expected: int = 0
    ) -> None:
        self.path = folder / METRICS_FILE
        self.was_removed = False
        self._waiting = b""
        self._has_failed = False
        try:
            found = _truncate(self.path, iteration, is_evaluated)
            with self.path.open("ab") as file:
                self._size = file.tell()  # bytes of complete lines
        except OSError as error:
            raise WriterError(
                f"{self.path}: {error.strerror}; free disk space, or choose another "
                "train.output_dir"
            ) from error
        self.records = max(found, expected)
        if found < expected:
            logger.warning(
                "%s lacks %d of the %d log records up to iteration %d, lost by a power failure or a"
                " change of the file; they do not come back", self.path, expected - found,
                expected, iteration,
            )  # fmt: skip

    def write(self, record: Record) -> None:
        """Append one record, whose numbers are finite or None."""
        self.records += not _is_evaluation(record)
        self._waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        self._write_waiting()

    def flush_to_disk(self) -> None:
        """Let the records survive a power failure, as far as they could be written."""
        with suppress(OSError):
            flush_to_disk(self.path)

    def close(self) -> None:
        """Try once more to write what could not be written."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            lost = self._waiting.count(b"\n")
            logger.error("%s lacks the last %d log records", self.path, lost)

    def _write_waiting(self) -> None:
        try:
            if not self.path.exists():
                if not self.was_removed:
                    logger.error("%s was removed or renamed; a new one is begun", self.path)
                self.was_removed, self._size = True, 0
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: a buffer would write what failed a second time
            with self.path.open("ab", buffering=0) as file:
                if self._has_failed:
                    file.truncate(self._size)  # half a line, if it could not be removed before
                view = memoryview(self._waiting)
                while view:  # at the end of the disk a short write comes first, then an error
                    view = view[file.write(view) :]
                size = file.tell()
        except OSError as error:
            if not self._has_failed:
                logger.error(
                    "%s cannot be written: %s; training goes on, log records are kept in memory "
                    "until there is room", self.path, error.strerror,
                )  # fmt: skip
            self._has_failed = True
            with suppress(OSError):
                os.truncate(self.path, self._size)
            return
        if self._has_failed:
            logger.warning("%s is complete again", self.path)
        self._has_failed, self._size, self._waiting = False, size, b""


def finite_record(record: Record) -> Record:
    """Return a record in which what is not finite is None."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in record.items()
    }


class RecordWriter(Callback, ABC):
    """Passes the log records on, on the main process: a base class for a logger of your own.

    A subclass has `open`, `write` and `close`. When one of them fails it is switched off with a
    warning, because looking on is not worth the training.
    """

    _is_open = False

    @abstractmethod
    def open(self, state: RunState) -> None:
        """Open what takes the records after `state.iteration`, which is 0 in a new run.

        Raises:
            WriterError: the run is not to start without.
        """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take a record: name -> finite number or None; with `iteration` and `epoch`."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Finish; `failed` says whether an exception ends the run."""

    def on_train_start(self, state: RunState) -> None:
        """Open it on the main process."""
        if is_main():
            self._is_open = self._succeeds(lambda: self.open(state))

    def on_log(self, state: RunState, record: Record) -> None:
        """Pass a record on."""
        if self._is_open:
            self._is_open = self._succeeds(lambda: self.write(record))

    def on_train_end(self, state: RunState, *, failed: bool) -> None:
        """Close it."""
        if self._is_open:
            try:
                self.close(failed=failed)
            except Exception as error:
                name = type(self).__name__
                logger.warning("%s did not close: %s: %s", name, type(error).__name__, error)

    def _succeeds(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except WriterError:
            raise
        except Exception as error:  # of any library
            logger.warning(
                "%s failed and is switched off, metrics.jsonl has all log records: %s: %s",
                type(self).__name__, type(error).__name__, error,
            )  # fmt: skip
            with suppress(Exception):  # what fails is often broken for good
                self.close(failed=True)
            return False
        return True


class TensorBoard(RecordWriter):
    """Writes TensorBoard's event files to `tensorboard/` in the output folder."""

    def open(self, state: RunState) -> None:
        """Hide the events of later iterations, which an abandoned run wrote."""
        # Imported here: it loads TensorFlow where that is installed, which takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        self._iteration = state.iteration
        self._folder = state.output_dir / "tensorboard"
        self._open = partial(SummaryWriter, str(self._folder))
        self._board = self._open(purge_step=state.iteration + 1)

    def write(self, record: Record) -> None:
        """Add a scalar for every number of the record."""
        if not self._folder.is_dir():  # found by its thread, this would be a traceback
            raise FileNotFoundError(f"{self._folder} was removed or renamed")
        iteration = int(record["iteration"] or 0)
        if iteration < self._iteration:  # after a rollback
            self._board.close()
            self._board = self._open(purge_step=iteration)
        self._iteration = iteration
        for name, value in record.items():
            if name != "iteration" and value is not None:
                self._board.add_scalar(name, value, iteration)
        self._board.flush()

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self._board.close()


class WeightsAndBiases(RecordWriter):
    """Sends the log records to a run of Weights & Biases; a resumed run continues the same one.

    They are plotted over `iteration`, which wandb is told is the axis: its own step only counts
    records, because wandb drops those whose step it has seen, and a resumed run repeats iterations.
    The id of its run is kept in `wandb_run_id.txt` in the output folder.

    Args:
        settings: the section `train.wandb`.
        config: of the run, to be shown and searched.
    """

    def __init__(self, settings: WandbSettings, config: Mapping[str, Any]) -> None:
        self._settings = settings
        self._config = dict(config)

    def open(self, state: RunState) -> None:
        """Start a run of wandb, or continue the one of the output folder.

        Raises:
            WriterError: the package wandb is missing, or a new run cannot start. A resumed one,
                which may run unattended, goes on without.
        """
        try:
            import wandb
        except ImportError as error:
            raise WriterError(
                f"train.wandb.enabled=true, but the package wandb cannot be imported ({error}): "
                "pip install 'dn_detr[wandb]', or train.wandb.enabled=false"
            ) from error
        is_resumed = state.iteration > 0
        id_file = state.output_dir / WANDB_RUN_FILE
        known = id_file.read_text().strip() if is_resumed and id_file.exists() else None
        try:
            self._run = wandb.init(
                project=self._settings.project,
                name=self._settings.name,
                mode=cast(Any, self._settings.mode),  # wandb checks it
                dir=state.output_dir,
                config=self._config,
                id=known,
                resume="allow" if known else None,
            )
        except Exception as error:
            if is_resumed:
                raise
            raise WriterError(
                "Weights & Biases does not start; `wandb login`, train.wandb.mode=offline or "
                f"train.wandb.enabled=false helps: {error}"
            ) from error
        id_file.write_text(self._run.id + "\n")
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, record: Record) -> None:
        """Log one record."""
        self._run.log({name: value for name, value in record.items() if value is not None})

    def close(self, *, failed: bool) -> None:
        """Finish the run of wandb; it shows as failed if an exception ends the training."""
        self._run.finish(exit_code=int(failed))


def _truncate(path: Path, iteration: int, is_evaluated: bool) -> int:
    """Keep the log records up to `iteration`; drop the line that a killed process was writing.

    A new run does not continue the records of one whose checkpoints are gone, and keeps them aside.

    Returns:
        How many records of the training are kept.
    """
    if not path.exists():
        return 0
    if iteration == 0 and path.is_file() and path.stat().st_size:
        aside = path.with_name(f"before_{path.name}")
        os.replace(path, aside)
        logger.warning("%s is of a run that left no checkpoint; it is kept as %s", path, aside)
        return 0
    kept, records = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            at = record["iteration"]
            is_pending = _is_evaluation(record) and not is_evaluated
            if at <= iteration - is_pending:
                kept.append(line + "\n")
                records += not _is_evaluation(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # no record
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
    return records


def _is_evaluation(record: Record) -> bool:
    return any(name.startswith("eval/") for name in record)
