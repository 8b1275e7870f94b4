"""Places at which a run waits until a test lets it go on, so that a fault meets it right there.

Environment variables say where: PAUSE_AT are the places, separated by commas, PAUSE_FOLDER a folder
in which a process that has come to one leaves a file, and in which the test leaves one to let it go
on. With PAUSE_IN_C the process does not wait but computes, for minutes, in one call of a library.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from dn_detr.checkpoint import read_manifest


def pause_at(place: str) -> None:
    """Wait here, if this is one of the places, until `let_go_on`."""
    if place not in os.environ.get("PAUSE_AT", "").split(","):
        return
    folder = Path(os.environ["PAUSE_FOLDER"])
    (folder / f"{place}, process {os.getpid()}").touch()
    if "PAUSE_IN_C" in os.environ:
        torch.linalg.eigvals(torch.rand(6000, 6000))
    while not (folder / f"{place}, go on").exists():
        time.sleep(0.005)


def let_go_on(folder: Path, place: str) -> None:
    """End the pause of all processes at this place; there will be no other one there."""
    (folder / f"{place}, go on").touch()


def has_paused(folder: Path, place: str) -> bool:
    """Whether a process has come to the place."""
    return any(folder.glob(f"{place}, process *"))


def pause_while_saving() -> None:
    """Let this process pause in a slow disk's place: while it flushes something of a checkpoint.

    The places are "saving N", before a file is flushed, and "recording N", when the results of the
    evaluation are there and `best` does not point at it yet. N is the iteration.
    """
    flush = os.fsync

    def slow_flush(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.parent.suffix == ".partial":
            pause_at(f"saving {int(path.parent.stem[1:])}")
        flush(file)
        if path.name.isdigit() and read_manifest(path).metrics is not None:
            pause_at(f"recording {int(path.name)}")

    os.fsync = slow_flush


def pause_at_the_end() -> None:
    """Let this process pause in a slow network's place: before a run closes its event file.

    The place is "end".
    """
    close = SummaryWriter.close

    def slow_close(board: SummaryWriter) -> None:
        pause_at("end")
        close(board)

    SummaryWriter.close = slow_close
