"""Asking a running training to stop: signals, the time limit, and what the process exits with.

The first signal is a request: the step in progress ends, a checkpoint is written and the process
exits with `EXIT_STOPPED`. A later one, or the end of the grace period, ends the process at once.
Before the first step nothing is lost by ending: see `StopRequest.begin_training`.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dn_detr.distributed import is_main, rank, world_size
from dn_detr.early_signals import EXIT_STOPPED as EXIT_STOPPED
from dn_detr.early_signals import STOP_SIGNALS

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_SIGNAL = 128  # plus the number of the signal that ended the process at once

# One request may arrive several times: from a scheduler that signals every process of a job, and
# again from the parent or torchrun, which pass it on.
_ONE_REQUEST_SECONDS = 1.0

# A timeout of a socket has a limit, a grace period has none.
_LONGEST_WAIT_SECONDS = 3600.0

_END = b"\0"  # to the thread that reads signals, whose numbers start at 1


class Stopped(Exception):
    """Training stopped on request after saving; `--resume` continues it."""


class WaitInterrupted(BaseException):
    """A signal arrived inside `StopRequest.interruptible`; no `except Exception` catches it."""


class KilledError(RuntimeError):
    """A started process was ended at once by a signal, without saving.

    Attributes:
        exit_code: 128 plus the number of the signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Whether this process was asked to stop, by a signal or because its time is up.

    A context manager. One process alone takes signals from `begin_training` on: before, they stay
    what they were, which ends a command at once (`dn_detr.early_signals`). One of several takes
    them as soon as it is entered, because the others would wait for it if it ended; whatever then
    ends it before `begin_training` ends it with `EXIT_STOPPED`.

    Signals are taken in the main thread; in any other thread they stay what they were. They are
    read by a thread of their own, because Python runs its handlers between two lines of the main
    thread only, and that may wait in a collective call for as long as another process hangs.

    Args:
        grace_seconds: the process ends itself this long after the first signal.
        max_hours: time limit, counted from now; None: none.
    """

    def __init__(self, grace_seconds: float = 120.0, max_hours: float | None = None) -> None:
        self._grace_seconds = grace_seconds
        self._max_hours = max_hours
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._first: tuple[float, int] | None = None
        self._is_installed = False
        self._is_interruptible = False
        self._has_begun = False
        self._has_saved = False

    @property
    def reason(self) -> str | None:
        """Why this process is to stop; None if it is not."""
        if self._first is not None:
            return signal.Signals(self._first[1]).name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"train.max_hours={self._max_hours:g}"
        return None

    def __enter__(self) -> StopRequest:
        if world_size() > 1:
            self._install()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_installed:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._sender.send(_END)  # closing is not enough: forked workers have the socket as well
        self._thread.join()
        self._sender.close()
        self._receiver.close()

    def begin_training(self) -> None:
        """Say that the first step is next: from now on a request is one to save."""
        self._has_begun = True
        self._install()

    def _install(self) -> None:
        if self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        self._is_installed = True
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        # Before the handlers, so that at every moment either the reader before or ours gets a
        # signal.
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def has_saved(self) -> None:
        """Say that the run has written its checkpoint: ending at once loses nothing any more."""
        self._has_saved = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal end what is done inside at once: waiting for images, for instance.

        Only where no other process waits for this one.

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
        # The thread may not have read the signal yet.
        self._first = self._first or (time.monotonic(), number)
        self._interrupt_if_requested()

    def _interrupt_if_requested(self) -> None:
        if self._is_interruptible and self._first is not None:
            self._is_interruptible = False
            raise WaitInterrupted

    def _listen(self) -> None:
        is_announced = False
        while number := self._next_signal():
            now = time.monotonic()
            self._first = self._first or (now, number)
            if not is_announced:
                is_announced = True
                self._announce(number)
            elif now - self._first[0] > _ONE_REQUEST_SECONDS:
                self._exit_at_once(number, "a second signal")

    def _next_signal(self) -> int:
        """Wait for a signal; 0 at the end. Watches the grace period meanwhile."""
        while True:
            if self._first is not None:
                left = self._first[0] + self._grace_seconds - time.monotonic()
                if left <= 0:
                    why = f"no checkpoint within train.grace_seconds={self._grace_seconds:g}"
                    self._exit_at_once(self._first[1], why)
                self._receiver.settimeout(min(left, _LONGEST_WAIT_SECONDS))
            try:
                received = self._receiver.recv(1)
            except TimeoutError:
                continue
            if received == _END or received[0] in STOP_SIGNALS:
                return received[0]

    def _announce(self, number: int) -> None:
        if is_main():
            what = "finishing this step and saving" if self._has_begun else "waiting for the start"
            _tell(
                f"{signal.Signals(number).name}: {what}, for at most {self._grace_seconds:g} s; "
                "a second signal exits at once"
            )

    def _exit_at_once(self, number: int, why: str) -> NoReturn:
        if self._has_saved:
            os._exit(EXIT_STOPPED)
        if not self._has_begun:
            _tell(f"{signal.Signals(number).name}: no step is in progress, exiting at once")
            os._exit(EXIT_STOPPED)
        _tell(f"{why} ({signal.Signals(number).name}): process {rank()} exits without saving")
        os._exit(EXIT_SIGNAL + number)


def _tell(text: str) -> None:
    # not through logging, whose lock may be held by a thread that waits for a file system
    os.write(2, f"{text}\n".encode())
