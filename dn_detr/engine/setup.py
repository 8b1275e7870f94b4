"""What happens before the first iteration: device, seed, output folder, log, environment."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from dn_detr.distributed import is_main, rank, world_size
from dn_detr.errors import UserError

_PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "omegaconf", "safetensors", "scipy")
# Rows of numbers that a progress bar shows anyway go to the file only.
FILE_ONLY = {"file_only": True}
# What somebody else prints goes to the file in any case.
NEVER_IN_TERMINAL = {"never_in_terminal": True}

logger = logging.getLogger(__name__)


class _TerminalHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        is_shown_by_bar = getattr(record, "file_only", False) and sys.stdout.isatty()
        if not (is_shown_by_bar or getattr(record, "never_in_terminal", False)):
            tqdm.write(self.format(record), file=sys.stdout)


class _LogFile(logging.FileHandler):
    """Writes a log; a full disk costs lines, is told once and stops nothing."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say on stderr why lines will be missing."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print(f"{self.baseFilename} will lack lines: {error.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Close the file; what could not be written is given up."""
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(output_dir: Path) -> Iterator[None]:
    """Log to the terminal and to `output_dir/log.txt`; only warnings, to stderr, on other ranks.

    Raises:
        ValueError: the file cannot be written to.
    """
    package = logging.getLogger("dn_detr")
    handlers: list[logging.Handler] = []
    if is_main():
        handlers = [_TerminalHandler(), _open_log(output_dir / "log.txt")]
        layout = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    else:
        handlers = [logging.StreamHandler()]
        layout = logging.Formatter(f"[rank {rank()}] %(levelname)s %(message)s")
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


def _open_log(path: Path) -> logging.Handler:
    try:
        return _LogFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written to: {error.strerror}") from error


def announce_device(device: torch.device, wanted: str) -> None:
    """Log what the run computes on; a CPU where nobody asked for it is a warning.

    Args:
        device: of this process.
        wanted: `train.device`.
    """
    if device.type == "cuda":
        logger.info("running on %s (%s)", device, torch.cuda.get_device_name(device))
    elif wanted == "auto":
        logger.warning("no GPU was found: running on the CPU, as with train.device=cpu")
    else:
        logger.info("running on %s", device)


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents.

    Raises:
        ValueError: it cannot be created or written to.
    """
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"train.output_dir={path}: cannot be created: there is a file of that name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train.output_dir={path}: cannot be created: {error}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"train.output_dir={path}: no permission to write there")
    return folder


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
    try:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        with (folder / "environment.txt").open("a", encoding="utf-8") as file:
            file.write(describe_environment(device) + "\n")
    except OSError as error:
        raise UserError(
            f"train.output_dir={folder}: cannot be written to: {error.strerror}; free disk space, "
            "or choose another folder"
        ) from error


def describe_environment(device: torch.device) -> str:
    """Return what a reader needs to repeat a run: versions, hardware, commit, command line."""
    entries = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join([sys.executable, *sys.argv]),
        "git commit": _git_commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("dn_detr", *_PACKAGES)},
        "platform": platform.platform(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
        "cuda": f"{torch.version.cuda}, cudnn {torch.backends.cudnn.version()}",
        "processes": str(world_size()),
        "cpu threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
    }
    return "".join(f"{name}: {value}\n" for name, value in entries.items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    """Return the commit of the checkout that holds this file, "-dirty" appended if changed."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return "not a checkout"
    # exclude: the commit itself, not its distance from a tag
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {getattr(error, 'stderr', error)}".strip()
    return done.stdout.strip()
