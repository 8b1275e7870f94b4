"""The output folder of a run: its lock, its log, and the record of config and environment."""

from __future__ import annotations

import datetime
import fcntl
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path

import torch
from tqdm import tqdm

from dn_detr.allocator import keep_freed_memory
from dn_detr.collect_env import describe_environment
from dn_detr.data import raise_open_file_limit
from dn_detr.distributed import is_main, rank, world_size
from dn_detr.errors import UserError, escape_control_characters, user_message
from dn_detr.streams import make_streams_lenient

from .devices import announce_device, choose_device
from .random_state import seed_everything
from .settings import TrainSettings
from .stopping import Stopped

# Log records that a progress bar shows anyway go to the file only.
FILE_ONLY = {"file_only": True}
# What the command prints by itself goes to the file only.
_NEVER_IN_TERMINAL = {"never_in_terminal": True}

_LOCK_FILE = ".lock"
# Processes of a run that was killed may need a moment to notice and to save.
_LOCK_SECONDS = 20.0

logger = logging.getLogger(__name__)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(super().format(record))


class _TerminalHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        is_shown_by_bar = getattr(record, "file_only", False) and sys.stdout.isatty()
        if not (is_shown_by_bar or getattr(record, "never_in_terminal", False)):
            tqdm.write(self.format(record), file=sys.stdout)


class _LogFile(WatchedFileHandler):
    """Writes a log, in a new file if that was removed or renamed; a full disk costs lines."""

    _has_failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        stream = self.stream
        try:
            super().emit(record)
            if self.stream is not stream:
                logger.error("%s was removed or renamed, this is a new one", self.baseFilename)
        except OSError:  # there is no new file either
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say on stderr why lines will be missing."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print(f"{self.baseFilename} will lack lines: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def prepared(settings: TrainSettings) -> Iterator[tuple[Path, torch.device]]:
    """Prepare this process and the output folder for a run, whose end the log then has.

    Raises:
        ValueError: there is no such device, or the folder cannot be used.
    """
    keep_freed_memory()
    raise_open_file_limit()
    device = choose_device(settings.device)
    seed_everything(settings.seed + rank())
    folder = make_folder(settings.output_dir)
    with logging_to(folder):
        try:
            with lock_folder(folder) if is_main() else nullcontext():
                announce_device(device, settings.device)
                yield folder, device
        except Stopped:
            raise
        except Exception as error:
            if is_main():
                text = traceback.format_exc()
                text = user_message(error) if isinstance(error, UserError) else text
                logger.error("%s", text, extra=_NEVER_IN_TERMINAL)
            raise


@contextmanager
def logging_to(output_dir: Path) -> Iterator[None]:
    """Log to the terminal and to `output_dir/log.txt`; only warnings, to stderr, on other ranks.

    Raises:
        ValueError: the file cannot be written to.
    """
    make_streams_lenient()
    package = logging.getLogger("dn_detr")
    handlers: list[logging.Handler] = []
    if is_main():
        try:
            handlers = [_TerminalHandler(), _LogFile(output_dir / "log.txt")]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written to: {error.strerror}") from error
        layout = _Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    else:
        handlers = [logging.StreamHandler()]
        layout = _Formatter(f"[rank {rank()}] %(levelname)s %(message)s")
    before = (package.level, package.propagate)
    package.setLevel(logging.INFO if is_main() else logging.WARNING)
    package.propagate = False
    for handler in handlers:
        handler.setFormatter(layout)
        package.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()
        package.setLevel(before[0])
        package.propagate = before[1]


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents.

    Raises:
        ValueError: it cannot be created or written to.
    """
    folder = Path(path)
    if "://" in str(path) or os.path.abspath(path) == os.sep:
        raise UserError(
            f"train.output_dir={path}: expected a folder of its own in a file system (a bucket can "
            "be mounted as one)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # also a null character
        raise UserError(f"train.output_dir={path}: cannot be created: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"train.output_dir={path}: no permission to write there")
    return folder


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder; the OS releases the lock when the process exits.

    Args:
        folder: of the run.

    Raises:
        UserError: another run goes on writing there; the message names its machine and process.
    """
    with (folder / _LOCK_FILE).open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                # of the process, unlike flock: workers that outlive it do not hold it
                fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    owner = (folder / _LOCK_FILE).read_text(encoding="utf-8").strip()
                    raise UserError(
                        f"train.output_dir={folder}: another run is writing there ({owner}); wait "
                        "until it has ended, stop it, or choose another folder"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): make sure that no second run writes there",
                    folder, error,
                )  # fmt: skip
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def record_run(config: str, folder: Path, device: torch.device) -> None:
    """Write `config.yaml` (can be run again) and add to `environment.txt`.

    A resumed run has one block of environment per start.

    Args:
        config: YAML of the config after overrides.
        folder: of the run.
        device: of the run.

    Raises:
        ValueError: they cannot be written.
    """
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        with (folder / "environment.txt").open("a", encoding="utf-8") as file:
            file.write(f"started: {started}\ndevice: {device}\nranks: {world_size()}\n")
            file.write(describe_environment() + "\n")
    except OSError as error:
        raise UserError(
            f"train.output_dir={folder}: cannot be written to: {error.strerror}; free disk space, "
            "or choose another folder"
        ) from error
