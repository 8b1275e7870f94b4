"""Signals that come while no training is in progress, because the program is starting or ending.

There is nothing to save then, but importing torch alone takes seconds, and joining other processes
as long as they need. This module imports nothing that takes time, so that a command can begin with
it; `dn_detr.engine.StopRequest` takes over while a training is in progress.
"""

from __future__ import annotations

import os
import signal
import socket
import threading

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not an error, to be tried again

# Schedulers warn with SIGTERM, SIGUSR1 or SIGUSR2, people with Ctrl-C.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def exit_when_signalled() -> None:
    """Let a signal that asks this process to stop end it at once, with `EXIT_STOPPED`.

    A thread reads the signals: the main thread may be inside a library for long.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_exit_on_signal, args=(receiver, sender), daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)


def _exit_on_signal(receiver: socket.socket, sender: socket.socket) -> None:
    # `sender` is kept alive by this thread: the interpreter knows its number only.
    while number := receiver.recv(1)[0]:
        if number in STOP_SIGNALS:
            text = f"{signal.Signals(number).name}: no step is in progress, exiting at once\n"
            os.write(2, text.encode())
            os._exit(EXIT_STOPPED)
