"""Worker processes that die, get signals or are stuck: real processes, real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import Pipe, Process, active_children, resource_sharer
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from dn_detr.data import CocoDetection, DatasetError, build_test_loader, build_train_loader
from dn_detr.data.workers import serve_the_parent
from dn_detr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HAZARD = 4


class Hazardous(Dataset[Any]):
    """Something happens to the process that reads image number ``HAZARD``."""

    def __init__(self, dataset: CocoDetection, happen: Callable[[], object]) -> None:
        self.dataset, self.happen = dataset, happen
        self.image_path = dataset.image_path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        if key in (HAZARD, (0, HAZARD)):
            self.happen()
        return self.dataset[key]


def suicide(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def train_loader(dataset: Any, **settings: Any) -> Any:
    return build_train_loader(dataset, 2, num_workers=2, **settings)


def test_loader(dataset: Any) -> Any:
    return build_test_loader(dataset, 2, num_workers=2)


test_loader.__test__ = False  # type: ignore[attr-defined]


def workers() -> list[BaseProcess]:
    return [child for child in active_children() if child.daemon]


@pytest.fixture(autouse=True)
def _no_worker_is_left_over() -> Iterator[None]:
    before = set(active_children())
    yield
    for child in set(active_children()) - before:
        child.kill()
        child.join()


@pytest.mark.parametrize("build", [train_loader, test_loader])
@pytest.mark.parametrize(
    ("happen", "manner", "remedy"),
    [
        (suicide(signal.SIGKILL), "was killed by SIGKILL", "out of memory"),
        (suicide(signal.SIGSEGV), "was killed by SIGSEGV", "convert it or remove it"),
        (suicide(signal.SIGBUS), "was killed by SIGBUS", "/dev/shm"),
        (suicide(signal.SIGRTMIN), "was killed by ", "convert it"),
        (lambda: os._exit(3), "ended with exit code 3", "convert it or remove it"),
        (lambda: os._exit(0), "ended with exit code 0", "convert it or remove it"),
    ],
    ids=["SIGKILL", "SIGSEGV", "SIGBUS", "real-time", "exit 3", "exit 0"],
)
def test_a_worker_that_dies_is_reported_with_the_file_that_it_was_reading(
    dataset: CocoDetection,
    build: Callable[..., Any],
    happen: Callable[[], object],
    manner: str,
    remedy: str,
) -> None:
    start = time.monotonic()
    with pytest.raises(DatasetError) as caught:
        list(islice(build(Hazardous(dataset, happen)), 4))
    message = str(caught.value)
    assert f"{manner}" in message and remedy in message
    assert f"while it read {dataset.image_path(HAZARD)};" in message
    assert re.search(r"\(pid \d+\)", message)
    assert isinstance(caught.value, UserError)
    assert time.monotonic() - start < 3


def test_a_replacement_that_kills_the_worker_is_named(dataset: CocoDetection) -> None:
    for index in set(range(7)) - {HAZARD}:
        dataset.image_path(index).write_bytes(b"broken")
    hazardous = Hazardous(dataset, suicide(signal.SIGKILL))
    with pytest.raises(DatasetError, match=f"while it read {dataset.image_path(HAZARD)}"):
        list(islice(train_loader(hazardous, on_error="skip"), 4))


def test_a_data_set_without_paths_is_reported_by_index(dataset: CocoDetection) -> None:
    hazardous = Hazardous(dataset, suicide(signal.SIGKILL))
    del hazardous.image_path
    with pytest.raises(DatasetError, match=f"while it read image {HAZARD};"):
        list(test_loader(hazardous))


def test_a_death_never_interrupts_what_the_main_process_does_between_batches(
    dataset: CocoDetection,
) -> None:
    batches = iter(train_loader(dataset))
    next(batches)
    victim = workers()[0]
    victim.kill()
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        time.sleep(0.01)  # a handler of SIGCHLD that raises would do so here
    with pytest.raises(DatasetError, match=rf"\(pid {victim.pid}\) was killed by SIGKILL"):
        next(batches)


def test_a_worker_that_dies_between_two_evaluations_is_reported(dataset: CocoDetection) -> None:
    loader = test_loader(dataset)
    list(loader)
    workers()[0].kill()
    workers()[0].join()
    with pytest.raises(DatasetError, match="was killed by SIGKILL after it had read"):
        list(loader)


def test_the_handler_of_child_signals_is_the_users_between_batches(
    dataset: CocoDetection,
) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))
    try:
        batches = iter(train_loader(dataset))
        next(batches)
        workers()[0].kill()
        with pytest.raises(DatasetError):
            for _ in batches:
                pass
        signal.raise_signal(signal.SIGCHLD)
        assert calls
    finally:
        signal.signal(signal.SIGCHLD, before)


def send(number: signal.Signals, process: BaseProcess) -> None:
    """Send a signal from another process than this one, as a scheduler does."""
    subprocess.run(["kill", f"-{number.value}", str(process.pid)], check=True)


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_workers_ignore_the_signals_of_a_scheduler(dataset: CocoDetection, name: str) -> None:
    batches = iter(train_loader(dataset))
    next(batches)
    for worker in workers():
        send(signal.Signals[name], worker)
    pids = {worker.pid for worker in workers()}
    time.sleep(0.1)
    assert len(list(islice(batches, 12))) == 12
    assert {worker.pid for worker in workers()} == pids


def stuck_workers(dataset: CocoDetection) -> tuple[Any, list[BaseProcess]]:
    """A loader, to be kept, and its workers, of which one sleeps in the data set."""
    batches = iter(test_loader(Hazardous(dataset, lambda: time.sleep(600))))
    next(batches)
    time.sleep(0.2)
    return batches, workers()


def test_a_stuck_worker_obeys_the_process_that_started_it(dataset: CocoDetection) -> None:
    _loader, started = stuck_workers(dataset)
    for worker in started:
        worker.terminate()
        worker.join(2)
    assert [worker.exitcode for worker in started] == [0, 0]


def hand_over_files(to_parent: Connection) -> None:
    """Serve the parent as a worker does that has tensors for it."""
    serve_the_parent(0)
    to_parent.send([resource_sharer.DupFd(to_parent.fileno())._id for _ in range(20)])
    to_parent.recv()


def test_a_worker_says_nothing_of_a_parent_that_stops_in_the_middle_of_a_batch(capfd) -> None:
    ours, theirs = Pipe()
    worker = Process(target=hand_over_files, args=(theirs,), daemon=True)
    worker.start()
    for identity in ours.recv():
        resource_sharer._ResourceSharer.get_connection(identity).close()
    ours.send("end")
    worker.join(10)
    assert (worker.exitcode, capfd.readouterr().err) == (0, "")


PROLOGUE = """
    import os, re, signal, sys, threading, time
    from dn_detr.data import CocoDetection, build_test_loader, build_train_loader

    class Stuck(CocoDetection):
        def __getitem__(self, key):
            if key == 4:
                {hazard}
            return super().__getitem__(key)

    dataset = Stuck(sys.argv[1], sys.argv[2], train=True)
"""


def start_script(dataset: CocoDetection, body: str, hazard: str = "pass") -> subprocess.Popen[str]:
    script = textwrap.dedent(PROLOGUE).format(hazard=hazard) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(dataset.image_dir), str(dataset.annotation_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "hazard",
    ["time.sleep(600)", "re.match('(a+)+$', 'a' * 60 + 'b')"],
    ids=["asleep", "in a library that holds the interpreter"],
)
def test_a_process_with_a_stuck_worker_ends_quickly(dataset: CocoDetection, hazard: str) -> None:
    body = """
        batches = iter(build_test_loader(dataset, num_workers=2))
        next(batches)
        time.sleep(0.5)
        print("end", flush=True)
    """
    process = start_script(dataset, body, hazard)
    assert process.stdout is not None and process.stdout.readline() == "end\n"
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_signals_to_the_whole_group_reach_the_main_process_only(dataset: CocoDetection) -> None:
    # Handlers, a wakeup descriptor and a storm of signals, also while workers are being born.
    body = """
        handled, alone, received = [], os.getpid(), 0
        def handle(number, frame):
            if os.getpid() != alone:
                os.write(1, b"a worker ran the handler of the main process\\n")
            handled.append(number)
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
            signal.signal(getattr(signal, name), handle)
        wakeup, theirs = os.pipe()
        os.set_blocking(theirs, False)
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        print("ready", flush=True)
        loaders = []
        for start in range(12):
            loaders.append(build_train_loader(dataset, 2, num_workers=2, start_iteration=start))
            batches = iter(loaders[-1])
            for _ in range(20):
                received += len(next(batches))
        for number in set(handled):  # Python's end restores what kills, if there is a handler
            signal.signal(number, signal.SIG_IGN)
        print(received, len(set(handled)))
    """
    process = start_script(dataset, body)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while process.poll() is None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.killpg(process.pid, number)
            time.sleep(0.002)
    output, errors = process.communicate(timeout=30)
    assert output == "480 4\n", errors
    assert process.returncode == 0
