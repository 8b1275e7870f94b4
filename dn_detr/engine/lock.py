"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dn_detr.errors import UserError

LOCK_FILE = ".lock"
# Processes of a run that was killed may need a moment to notice and to save.
_PATIENCE_SECONDS = 20.0

logger = logging.getLogger(__name__)


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder; the system ends the lock with the process.

    Args:
        folder: of the run.

    Raises:
        ValueError: another run goes on writing there; the message names its machine and process.
    """
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        _lock(file.fileno(), folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _lock(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            # of the process, unlike flock: workers that outlive it do not hold it
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                owner = (folder / LOCK_FILE).read_text(encoding="utf-8").strip()
                raise UserError(
                    f"train.output_dir={folder}: another run is writing there ({owner}); wait "
                    "until it has ended, stop it, or choose another folder"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): make sure that no second run writes there", folder, error
            )
            return
