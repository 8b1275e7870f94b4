"""Asking a running training to stop: signals, the time limit, and what the process exits with.

The first signal is a request: the step in progress ends, a checkpoint is written and the process
exits with `EXIT_STOPPED`. A second one, or the end of the grace period, ends the process.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dn_detr.distributed import is_main, rank
from dn_detr.signals import EXIT_STOPPED as EXIT_STOPPED
from dn_detr.signals import SignalThread
from dn_detr.streams import tell

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_SIGNAL = 128  # plus the number of the signal that ended the process

# One request may arrive several times: from a scheduler that signals every process of a job, and
# again from the parent or torchrun, which pass it on.
_ONE_REQUEST_SECONDS = 1.0


class Stopped(Exception):
    """Training stopped on request after saving; `--resume` continues it."""


class WaitInterrupted(BaseException):
    """A signal arrived inside `StopRequest.interruptible`; no `except Exception` catches it."""


class KilledError(RuntimeError):
    """A second signal ended a started process, without saving.

    Attributes:
        exit_code: 128 plus the number of the signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Whether this process was asked to stop, by a signal or because its time is up.

    A context manager around the training, which takes signals inside (in the main thread only);
    before, they stay what they were, which ends a command (`dn_detr.signals`).

    Args:
        grace_seconds: the process ends itself this long after the first signal.
        max_hours: time limit, counted from now; None: none.
    """

    def __init__(self, grace_seconds: float = 120.0, max_hours: float | None = None) -> None:
        self._grace_seconds = grace_seconds
        self._max_hours = max_hours
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._signal: int | None = None  # the first
        self._requested_at: float | None = None
        self._is_interruptible = False
        self._has_saved = False

    @property
    def reason(self) -> str | None:
        """Why this process is to stop; None if it is not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"train.max_hours={self._max_hours:g}"
        return None

    def __enter__(self) -> StopRequest:
        self._signals = SignalThread(self._react, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._signals.close()

    def has_saved(self) -> None:
        """Say that the run has written its checkpoint: ending now loses nothing any more."""
        self._has_saved = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end what is done inside: waiting for images, for instance.

        Only where no other rank waits for this one.

        Raises:
            WaitInterrupted: a signal arrived, inside or before.
        """
        self._is_interruptible = True
        try:
            self._interrupt_if_requested()
            yield
        finally:
            self._is_interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number  # the thread may not have read it yet
        self._interrupt_if_requested()

    def _interrupt_if_requested(self) -> None:
        if self._is_interruptible and self._signal is not None:
            self._is_interruptible = False
            raise WaitInterrupted

    def _react(self, number: int | None) -> float:
        now = time.monotonic()
        if self._requested_at is None:
            assert number is not None
            self._requested_at = now
            self._signal = self._signal or number
            if is_main():
                tell(
                    f"{signal.Signals(number).name}: finishing this step and saving, for at most "
                    f"{self._grace_seconds:g} s; a second signal exits now"
                )
        passed = now - self._requested_at
        # the kernel repeats SIGXCPU every second of CPU time
        if number not in (None, signal.SIGXCPU) and passed > _ONE_REQUEST_SECONDS:
            self._exit(number, "a second signal")
        if passed >= self._grace_seconds:
            why = f"no checkpoint within train.grace_seconds={self._grace_seconds:g}"
            self._exit(self._signal or 0, why)
        return self._grace_seconds - passed

    def _exit(self, number: int, why: str) -> NoReturn:
        if self._has_saved:
            os._exit(EXIT_STOPPED)
        tell(f"{why} ({signal.Signals(number).name}): rank {rank()} exits without saving")
        os._exit(EXIT_SIGNAL + number)
