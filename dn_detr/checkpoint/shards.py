"""How processes that write shards of one checkpoint tell the first one that theirs are complete.

Through files in the folder that all of them write to, not through collectives: those belong to
the training, whose thread must not be disturbed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .manifest import CheckpointError, replace_file

_ERROR = "error"
_POLL_SECONDS = 0.02


def hand_over(folder: Path, rank: int, digests: Mapping[str, str]) -> None:
    """Say that this process's files are complete.

    Args:
        folder: where the files are.
        rank: of this process.
        digests: file name -> SHA-256 in hexadecimal.
    """
    replace_file(folder / _report_name(rank), json.dumps(dict(digests)).encode())


def report_failure(folder: Path, rank: int, error: Exception) -> None:
    """Say that this process's files will not be complete, so that nobody waits for them."""
    # If the disk fails here too, the first process gives up after its time limit.
    with suppress(OSError):
        hand_over(folder, rank, {_ERROR: str(error)})


def collect(folder: Path, world_size: int, timeout: float) -> dict[str, str]:
    """Wait for the files of all other processes.

    Args:
        folder: where the files are.
        world_size: number of processes.
        timeout: seconds to wait at most.

    Returns:
        File name -> SHA-256 in hexadecimal, of all other processes.

    Raises:
        CheckpointError: a process failed, or did not finish in time.
    """
    deadline = time.monotonic() + timeout
    missing = set(range(1, world_size))
    digests: dict[str, str] = {}
    while missing:
        present = set(os.listdir(folder))  # listing makes a network file system look again
        for rank in [rank for rank in sorted(missing) if _report_name(rank) in present]:
            report = json.loads((folder / _report_name(rank)).read_bytes())
            if _ERROR in report:
                raise CheckpointError(f"process {rank} failed: {report[_ERROR]}")
            digests |= report
            missing.remove(rank)
            (folder / _report_name(rank)).unlink()
        if missing and time.monotonic() > deadline:
            raise CheckpointError(
                f"the shards of processes {sorted(missing)} did not appear within {timeout:g} s; "
                "all processes need the same output folder on a shared file system"
            )
        if missing:
            time.sleep(_POLL_SECONDS)
    return digests


def _report_name(rank: int) -> str:
    return f".shard-{rank:05d}.json"
