"""Signals that ask a process to stop, read at any time, also while it is inside a library.

This module imports nothing that takes time, so that a command can begin with
`exit_when_signalled`. While a training is in progress, `dn_detr.engine.StopRequest` takes over.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType

from dn_detr.streams import open_closed_streams, tell

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not an error, to be tried again

# Schedulers warn with SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU (the limit of CPU time), people with
# Ctrl-C, a terminal that is closed with SIGHUP.
STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU,
)  # fmt: skip

_LONGEST_WAIT_SECONDS = 3600.0  # select has a limit
_END = b"\0"  # no signal has this number


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


class SignalThread:
    """Gives `STOP_SIGNALS` to a function, in a thread of its own, until it is closed.

    Python runs its handlers in the main thread only, which may be inside a library for long, or
    wait in a collective call for a rank that hangs. A context manager. Outside the main thread,
    where Python installs no handlers, signals stay what they were.

    Args:
        react: called with the number of a signal, or with None when the time that it asked for is
            over; returns the seconds until it wants to be called again, None: never.
        handler: of the main thread.
    """

    def __init__(
        self,
        react: Callable[[int | None], float | None],
        handler: Callable[[int, FrameType | None], None] = _ignore,
    ) -> None:
        self._react = react
        self._is_installed = threading.current_thread() is threading.main_thread()
        if not self._is_installed:
            return
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)
        # Before the handlers, so that at every moment the reader before or this one gets a signal.
        self._wakeup = signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, handler)
            for number in STOP_SIGNALS
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN)  # nohup
        }
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a cluster's job starts with them

    def __enter__(self) -> SignalThread:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Put back what took the signals before."""
        if not self._is_installed:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._sender, _END)
        self._thread.join()
        os.close(self._sender)
        os.close(self._receiver)

    def _read(self) -> None:
        wait: float | None = None
        while True:
            timeout = None if wait is None else min(max(wait, 0.0), _LONGEST_WAIT_SECONDS)
            if not select.select([self._receiver], [], [], timeout)[0]:
                wait = self._react(None)
                continue
            received = os.read(self._receiver, 1)
            if received == _END:
                return
            if received[0] in STOP_SIGNALS:
                wait = self._react(received[0])


def exit_when_signalled() -> None:
    """Let a signal that asks this process to stop end it, with `EXIT_STOPPED`.

    For a command that is starting or ending: importing torch alone takes seconds. Standard streams
    that are closed are opened first, see `open_closed_streams`.
    """
    open_closed_streams()
    SignalThread(_exit)


def _exit(number: int | None) -> None:
    if number is not None:
        tell(f"{signal.Signals(number).name}: no step is in progress, exiting now")
        os._exit(EXIT_STOPPED)
