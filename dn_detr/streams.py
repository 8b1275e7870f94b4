"""Standard streams that do not end a process: their reader may go away, their disk may be full.

This module imports nothing that takes time, so that a command can begin with it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class _Lenient:
    """A stream that drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_closed_streams() -> None:
    """Open standard streams that are closed, to nowhere.

    A file that the process opens would get their number otherwise, and what is meant for a terminal
    would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one


def make_streams_lenient() -> None:
    """Let no write to stdout or stderr fail; what cannot be written there is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Lenient):
            setattr(sys, name, _Lenient(stream or open(os.devnull, "w")))  # noqa: SIM115


def tell(text: str) -> None:
    """Write a line to stderr, from anywhere: logging's lock may be held by a thread that waits."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
