"""Worker processes of a loader: what they read, which signals they obey, and how they died.

torch reports the death of a worker without the file that killed it, and lets every signal that a
scheduler sends to all processes of a job end the workers before the main process has saved.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, cast

import torch
from torch.utils.data import Dataset, get_worker_info

from .errors import DatasetError

# By name, because not every system has them.
_IGNORED = [
    getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
_HAS_MASKS = hasattr(signal, "pthread_sigmask")

# Seconds.
_BETWEEN_LOOKS_AT_THE_PARENT = 5
_UNTIL_A_DEATH_IS_KNOWN = 1
_TO_END_AT_EXIT = 1

_REMEDIES = {
    "SIGKILL": "most often by the kernel, out of memory (`dmesg` says so): lower num_workers or"
    " image_scale, or give the job more memory",
    "SIGBUS": "most often because shared memory is full: enlarge /dev/shm (docker run"
    " --shm-size=8g)",
}
_CRASH_REMEDY = "if the same file does it again, convert it or remove it from the annotation file"


class ReadingJournal:
    """What each worker is reading, in memory shared with the process that starts the workers.

    Args:
        num_workers: number of workers, at least 1.
    """

    def __init__(self, num_workers: int) -> None:
        # per worker the index of an image, -1 before the first; and 1 while that is being read
        self._rows = torch.tensor([[-1, 0]] * num_workers).share_memory_()  # (num_workers, 2)

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Note, in a worker, that it reads image ``index`` while the context lasts."""
        row = self._rows[cast(Any, get_worker_info()).id]
        row[0], row[1] = index, 1
        try:
            yield
        finally:
            row[1] = 0

    def last(self, worker: int) -> tuple[int | None, bool]:
        """The image that a worker read last, None = none yet, and whether it was still at it."""
        index, is_reading = self._rows[worker].tolist()
        return (None if index < 0 else index), bool(is_reading)


class JournaledDataset(Dataset[Any]):
    """A data set that notes in a journal what is being read from it; for worker processes.

    Args:
        dataset: its keys are an index or (epoch, index).
        journal: where to note the index.
    """

    def __init__(self, dataset: Dataset[Any], journal: ReadingJournal) -> None:
        self.dataset, self.journal = dataset, journal

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        with self.journal.reading(key[1] if isinstance(key, tuple) else key):
            return self.dataset[key]

    def image_path(self, index: int) -> str:
        """The file of an image, or its index if the data set does not tell."""
        return file_of(self.dataset, index)


def file_of(dataset: Dataset[Any], index: int) -> str:
    """Path of an image, or its index if the data set has no method ``image_path``."""
    return str(dataset.image_path(index)) if hasattr(dataset, "image_path") else f"image {index}"


def serve_the_parent(_worker: int) -> None:
    """Live and end as the process that started this worker wants; a loader's ``worker_init_fn``."""
    _leave_signals_to_the_parent()
    sys.excepthook = _say_nothing_of_a_parent_that_left


def _say_nothing_of_a_parent_that_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report what no code catches, except that a parent which ends takes no batch any more.

    A thread of multiprocessing hands over each tensor, and would print a traceback then.
    """
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _leave_signals_to_the_parent() -> None:
    """Let only the process that started this worker end it.

    Ctrl-C and a scheduler's signals reach every process of a job, and the main process needs its
    workers to finish its step. SIGINT, SIGUSR1 and SIGUSR2 are ignored. SIGTERM counts only from
    the parent, which ends stuck workers with it. Where a system cannot tell who sent a signal
    (macOS), SIGTERM stays as torch has it.
    """
    signal.set_wakeup_fd(-1)  # the parent's, if it has one: it would be told of our signals
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if not _HAS_MASKS:
        return
    # The parent's handler looks at its own children.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [*_IGNORED, signal.SIGTERM])


def _end_with_the_parent() -> None:
    """End this process when its parent says so or is gone, also in the middle of an image."""
    starter, parent = cast(BaseProcess, multiprocessing.parent_process()).pid, os.getppid()
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, _BETWEEN_LOOKS_AT_THE_PARENT)
        if (received is not None and received.si_pid == starter) or os.getppid() != parent:
            os._exit(0)


class WorkerWatch:
    """Starts the workers of one loader, and reports a death with the file that was being read.

    Args:
        dataset: gives the names of the files.
        num_workers: number of workers, at least 1; they are started once.

    Attributes:
        journal: for the ``JournaledDataset`` that the workers read.
        context: what a ``DataLoader`` takes as ``multiprocessing_context`` to have its workers
            watched.
    """

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        self.journal = ReadingJournal(num_workers)
        self.context: BaseContext = copy.copy(
            multiprocessing.get_context(multiprocessing.get_start_method())
        )
        self.context.Process = self._record(self.context.Process)  # type: ignore[attr-defined]
        self._dataset = dataset
        self._workers: list[BaseProcess] = []
        self._has_begun = False
        self._first_dead: int | None = None

    def _record(self, process_type: Callable[..., BaseProcess]) -> Callable[..., BaseProcess]:
        def create(*args: Any, **settings: Any) -> BaseProcess:
            process = process_type(*args, **settings)
            self._workers.append(process)
            return process

        return create

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Create within this context what starts the workers.

        Signals for workers wait until they are ready: a worker is born with the handlers of its
        parent, and would run them before ``serve_the_parent`` does away with them.
        The signals of the parent wait, too. torch's handler of SIGCHLD is taken away again: it
        raises wherever the main process happens to be, also while it saves a checkpoint.
        """
        with _signals_held_back(), _handler_of_child_signals_kept():
            yield

    def begin(self, results: Any) -> None:
        """Watch the workers from now on, if that has not begun yet.

        When this process ends, they end, whatever they are doing.

        Args:
            results: the ``multiprocessing.Queue`` that they write to.
        """
        if self._has_begun:
            return
        self._has_begun, workers = True, list(self._workers)
        # Before multiprocessing's own way, which waits without limit for a worker that is stuck
        # in a library and does not hear SIGTERM.
        Finalize(None, _end, args=(workers,), exitpriority=0)
        threading.Thread(target=self._await_death, args=(workers, results), daemon=True).start()

    def end(self) -> None:
        """End the workers, whatever they are doing."""
        _end([worker for worker in self._workers if worker.pid is not None])

    def _await_death(self, workers: list[BaseProcess], results: Any) -> None:
        """Let the main process read the end of the results when a worker dies.

        Otherwise it would look at its workers every 5 seconds only, and never again if one died
        while it was writing: the rest of a message would be awaited for ever, because everybody
        else holds the pipe open.
        """
        dead = wait([worker.sentinel for worker in workers])
        self._first_dead = next(n for n, worker in enumerate(workers) if worker.sentinel in dead)
        for worker in workers:
            worker.terminate()
        results._writer.close()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Read from the workers within this context.

        Raises:
            DatasetError: a worker is dead; names the file, the process, how it died and what
                helps.
        """
        self._refuse_the_dead()
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            # What a dead worker leaves behind makes torch raise many things, some of them before
            # the death is known. What a living one passes on begins with "Caught".
            if not str(error).startswith("Caught "):
                self._refuse_the_dead(cause=error)
            raise

    def _refuse_the_dead(self, cause: Exception | None = None) -> None:
        started = {w.sentinel: w for w in self._workers if w.pid is not None}
        for sentinel in wait(list(started), _UNTIL_A_DEATH_IS_KNOWN if cause else 0):
            started[cast(int, sentinel)].join()  # it is ending
        dead = [n for n, worker in enumerate(self._workers) if worker.exitcode is not None]
        if not dead:
            return
        # All others were ended after the first, see above.
        number = dead[0] if self._first_dead is None else self._first_dead
        worker = self._workers[number]
        death, remedy = _manner_of_death(cast(int, worker.exitcode))
        raise DatasetError(
            f"a worker process of the loader (pid {worker.pid}) {death}"
            f" {self._occupation(number)}; {remedy}"
        ) from cause

    def _occupation(self, number: int) -> str:
        index, was_reading = self.journal.last(number)
        if index is None:
            return "before it read any image"
        file = file_of(self._dataset, index)
        return f"while it read {file}" if was_reading else f"after it had read {file}"


def _manner_of_death(exitcode: int) -> tuple[str, str]:
    """How a process died, and what helps."""
    if exitcode >= 0:
        return f"ended with exit code {exitcode}", _CRASH_REMEDY
    number = -exitcode
    name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
    return f"was killed by {name}", _REMEDIES.get(name, _CRASH_REMEDY)


def _end(workers: list[BaseProcess]) -> None:
    """End workers, which have nothing to save, whatever they are doing."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + _TO_END_AT_EXIT
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Deliver no signal to this thread, or to processes that it forks, until the end."""
    if not _HAS_MASKS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*_IGNORED, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handler_of_child_signals_kept() -> Iterator[None]:
    """Put back the handler of SIGCHLD at the end."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield  # only the main thread sets handlers
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
