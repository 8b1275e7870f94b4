"""Which exceptions a user can act on, so that the command line shows a message, not a traceback."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from .memory import OutOfMemory

_PACKAGE_FOLDER = Path(__file__).parents[1]


class LaunchError(ValueError):
    """The processes cannot be started as asked, or a started one reported a mistake of a user."""


class ProcessFailure(RuntimeError):
    """A started process failed; the message is its traceback."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names iteration, terms and images."""


def is_user_error(error: BaseException) -> bool:
    """Return whether this package raised `error` to report a user's mistake or a bad run.

    A ValueError from the depths of another library is a bug to be seen with its traceback; the
    frame that raised it tells them apart.
    """
    if isinstance(error, (NonFiniteError, OutOfMemory)):
        return True
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return module.split(".")[0] == __name__.split(".")[0] or _from_loader_worker(error)


def _from_loader_worker(error: BaseException) -> bool:
    """Return whether a loader's worker process passed on a mistake that this package reported."""
    text = str(error)
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text:
        return False
    locations = [line for line in text.splitlines() if line.lstrip().startswith('File "')]
    return bool(locations) and locations[-1].lstrip().startswith(f'File "{_PACKAGE_FOLDER}{os.sep}')


def user_message(error: BaseException) -> str:
    """Return the message of a user error, without the traceback that a loader's worker adds."""
    text = str(error)
    if not _from_loader_worker(error):
        return text
    lines = text.splitlines()
    last_frame = max(i for i, line in enumerate(lines) if line.startswith("  "))
    return "\n".join(lines[last_frame + 1 :]).split(": ", 1)[-1]
