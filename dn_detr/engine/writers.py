"""Where the rows of a run go: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases.

metrics.jsonl is the record of a run: nothing is lost from it while the run lives, and a resumed
run continues it exactly. The others are for looking on. Neither stops a training that works: a
full disk holds back rows of metrics.jsonl until there is room, and another writer that fails is
switched off with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, cast

from dn_detr.distributed import is_main
from dn_detr.errors import UserError

from .metrics import Row
from .settings import WandbSettings

METRICS_FILE = "metrics.jsonl"
WANDB_RUN_FILE = "wandb_run_id.txt"

logger = logging.getLogger(__name__)


class WriterError(UserError):
    """A writer cannot be opened; the message names the file or setting and the remedy."""


class MetricsWriter(Protocol):
    """Takes the rows of a run; a place of your own to log to needs these two methods."""

    def write(self, row: Row) -> None:
        """Take a row; it has `iteration`, and its numbers are finite or None."""

    def close(self, *, failed: bool) -> None:
        """Finish; `failed` says whether an exception ends the run."""


class JsonLinesWriter:
    """Writes `metrics.jsonl`; rows that an abandoned run wrote after `iteration` are removed.

    A row that cannot be written (the disk is full) is kept in memory and written before the next
    one; the file never holds a part of a line for longer than the attempt.

    Args:
        folder: output folder of the run.
        iteration: the run continues after this one; 0 for a new run.
        is_evaluated: whether rows of the evaluation at `iteration` are kept.

    Raises:
        WriterError: the file cannot be read or written when the run starts.
    """

    def __init__(self, folder: Path, iteration: int, *, is_evaluated: bool = False) -> None:
        self.path = folder / METRICS_FILE
        self._waiting: list[bytes] = []
        self._has_failed = False
        try:
            _truncate(self.path, iteration, is_evaluated)
            # unbuffered: a buffer would write what failed a second time
            self._file = self.path.open("ab", buffering=0)
            self._whole = self.path.stat().st_size  # bytes of complete rows
        except OSError as error:
            raise WriterError(
                f"{self.path}: {error.strerror}; free disk space, or choose another "
                "train.output_dir"
            ) from error

    def write(self, row: Row) -> None:
        """Append one row."""
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._write_waiting()

    def close(self, *, failed: bool = False) -> None:
        """Try once more to write what could not be written, and close the file."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            logger.error("%s lacks the last %d rows", self.path, len(self._waiting))
        with suppress(OSError):  # a network's file system may tell only now that it is full
            self._file.close()

    def _write_waiting(self) -> None:
        content = b"".join(self._waiting)
        try:
            if self._has_failed:
                self._remove_half_rows()
            _write_all(self._file, content)
        except OSError as error:
            with suppress(OSError):
                self._remove_half_rows()
            if not self._has_failed:
                logger.error(
                    "%s cannot be written: %s; training goes on, rows are kept in memory until "
                    "there is room", self.path, error.strerror,
                )  # fmt: skip
            self._has_failed = True
            return
        if self._has_failed:
            logger.warning("%s is complete again", self.path)
        self._has_failed = False
        self._whole += len(content)
        self._waiting.clear()

    def _remove_half_rows(self) -> None:
        os.ftruncate(self._file.fileno(), self._whole)


class TensorBoardWriter:
    """Writes TensorBoard's event files; needs the package tensorboard.

    Args:
        folder: output folder of the run; events go to `tensorboard/` there.
        iteration: the run continues after this one; TensorBoard hides later events.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        # Imported here: it loads TensorFlow where that is installed, which takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def write(self, row: Row) -> None:
        """Add a scalar for every number of the row."""
        for name, value in row.items():
            if name != "iteration" and value is not None:
                self._board.add_scalar(name, value, row["iteration"])
        self._board.flush()

    def close(self, *, failed: bool = False) -> None:
        """Close the event file."""
        self._board.close()


class WandbWriter:
    """Sends rows to a run of Weights & Biases; a resumed run continues the same one.

    Rows are plotted over `iteration`, which wandb is told is the axis: its own step only counts
    rows, because wandb drops rows whose step it has seen, and a resumed run repeats iterations.

    Args:
        folder: output folder of the run; keeps the id of the wandb run.
        iteration: the run continues after this one; 0 starts a new wandb run.
        settings: the section `train.wandb`.
        config: of the run, to be shown and searched.

    Raises:
        WriterError: the package wandb is missing.
    """

    def __init__(
        self, folder: Path, iteration: int, settings: WandbSettings, config: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise WriterError(
                f"train.wandb.enabled=true, but the package wandb cannot be imported ({error}): "
                "pip install 'dn_detr[wandb]', or train.wandb.enabled=false"
            ) from error
        id_file = folder / WANDB_RUN_FILE
        known = id_file.read_text().strip() if iteration > 0 and id_file.exists() else None
        self._run = wandb.init(
            project=settings.project,
            name=settings.name,
            mode=cast(Any, settings.mode),  # wandb checks it
            dir=folder,
            config=dict(config),
            id=known,
            resume="allow" if known else None,
        )
        id_file.write_text(self._run.id + "\n")
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, row: Row) -> None:
        """Log one row."""
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self, *, failed: bool = False) -> None:
        """Finish the wandb run; it shows as failed if an exception ends it."""
        self._run.finish(exit_code=int(failed))


class RunWriters:
    """Passes every row to all writers; a context manager that closes them.

    Args:
        record: may not fail; `JsonLinesWriter` in a training. None: there is no record.
    """

    def __init__(self, record: MetricsWriter | None = None) -> None:
        self._record = record
        self._others: dict[str, MetricsWriter] = {}

    def add(self, name: str, writer: MetricsWriter) -> None:
        """Add a writer that is switched off with a warning when it fails.

        Args:
            name: for messages.
            writer: gets all rows from now on.
        """
        self._others[name] = writer

    def write(self, row: Row) -> None:
        """Pass on one row; it needs `iteration`, and what is not finite becomes None."""
        finite = {name: value if _is_finite(value) else None for name, value in row.items()}
        if self._record is not None:
            self._record.write(finite)
        for name, writer in list(self._others.items()):
            try:
                writer.write(finite)
            except Exception as error:  # of any library: it is not worth the training
                del self._others[name]
                _warn_switched_off(name, error)
                with suppress(Exception):  # what fails is often broken for good
                    writer.close(failed=True)

    def close(self, *, failed: bool = False) -> None:
        """Close all writers; `failed` says whether an exception ends the run."""
        if self._record is not None:
            self._record.close(failed=failed)
        for name, writer in self._others.items():
            try:
                writer.close(failed=failed)
            except Exception as error:
                logger.warning("%s did not close: %s: %s", name, type(error).__name__, error)

    def __enter__(self) -> RunWriters:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None)


def open_writers(
    folder: Path,
    iteration: int,
    *,
    is_evaluated: bool = False,
    wandb: WandbSettings | None = None,
    config: Mapping[str, Any] | None = None,
) -> RunWriters:
    """Open the writers of a run on the first process; on the others rows are dropped.

    Args:
        folder: output folder of the run.
        iteration: the run continues after this one; 0 for a new run.
        is_evaluated: whether rows of the evaluation at `iteration` are kept.
        wandb: Weights & Biases, if it is enabled.
        config: of the run, shown by Weights & Biases.

    Raises:
        WriterError: metrics.jsonl cannot be written, or a new run cannot start Weights & Biases. A
            resumed run, which nobody may be watching, goes on without.
    """
    if not is_main():
        return RunWriters()
    writers = RunWriters(JsonLinesWriter(folder, iteration, is_evaluated=is_evaluated))
    try:
        writers.add("TensorBoard", TensorBoardWriter(folder, iteration))
    except Exception as error:
        _warn_switched_off("TensorBoard", error)
    if wandb is not None and wandb.enabled:
        try:
            writers.add("Weights & Biases", WandbWriter(folder, iteration, wandb, config or {}))
        except Exception as error:
            if isinstance(error, WriterError):
                raise
            if iteration == 0:
                raise WriterError(
                    "Weights & Biases does not start; `wandb login`, train.wandb.mode=offline or "
                    f"train.wandb.enabled=false helps: {error}"
                ) from error
            _warn_switched_off("Weights & Biases", error)
    return writers


def _warn_switched_off(name: str, error: Exception) -> None:
    logger.warning(
        "%s failed and is switched off, metrics.jsonl has all rows: %s: %s",
        name, type(error).__name__, error,
    )  # fmt: skip


def _is_finite(value: float | int | None) -> bool:
    return value is not None and math.isfinite(value)


def _write_all(file: FileIO, content: bytes) -> None:
    """Write everything; what meets the end of the disk is a short write first, then an error."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _truncate(path: Path, iteration: int, is_evaluated: bool) -> None:
    """Keep the rows up to `iteration`; drop the line that a killed process was writing.

    A new run does not continue the rows of one whose checkpoints are gone, and keeps them aside.
    """
    if not path.exists():
        return
    if iteration == 0 and path.is_file() and path.stat().st_size:
        aside = path.with_name(f"before_{path.name}")
        os.replace(path, aside)
        logger.warning("%s is of a run that left no checkpoint; it is kept as %s", path, aside)
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line + "\n" for line in lines if _is_kept(line, iteration, is_evaluated)]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _is_kept(line: str, iteration: int, is_evaluated: bool) -> bool:
    try:
        row = json.loads(line)
        at = row["iteration"]
    except (ValueError, KeyError, TypeError):
        return False
    is_evaluation = any(name.startswith("eval") for name in row)
    is_pending = is_evaluation and at == iteration and not is_evaluated
    return at <= iteration and not is_pending
