"""Worker processes that die, get signals or are stuck: real processes, real signals."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from dn_detr.data import CocoDetection, DatasetError, build_test_loader, build_train_loader
from dn_detr.data.packing import pack

ROOT = Path(__file__).resolve().parents[2]
HAZARD = 4


class Hazardous(Dataset[Any]):
    """Something happens to the process that reads image number `HAZARD`."""

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


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("build", "happen", "exit_code", "remedy"),
    [
        (train_loader, suicide(signal.SIGKILL), -9, "memory ran out"),
        pytest.param(test_loader, suicide(signal.SIGKILL), -9, "memory ran out", marks=slow),
        pytest.param(train_loader, suicide(signal.SIGBUS), -7, "/dev/shm", marks=slow),
        pytest.param(test_loader, suicide(signal.SIGSEGV), -11, "num_workers=0", marks=slow),
        pytest.param(train_loader, lambda: os._exit(3), 3, "num_workers=0", marks=slow),
        pytest.param(test_loader, lambda: os._exit(0), 0, "num_workers=0", marks=slow),
    ],
    ids=["SIGKILL", "SIGKILL in an evaluation", "SIGBUS", "SIGSEGV", "exit 3", "exit 0"],
)
def test_a_worker_that_dies_is_reported_with_its_exit_code_and_remedies(
    dataset: CocoDetection,
    build: Callable[..., Any],
    happen: Callable[[], object],
    exit_code: int,
    remedy: str,
) -> None:
    with pytest.raises(DatasetError, match=rf"\(pid \d+: exit code {exit_code}\)") as caught:
        list(islice(build(Hazardous(dataset, happen)), 4))
    assert remedy in str(caught.value)
    assert not workers()


def pack_without_files(samples: list[Any]) -> Any:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return pack(samples)


def send_without_files(samples: list[Any]) -> Any:
    packed = pack(samples)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return packed


@pytest.mark.parametrize("function", [pack_without_files, send_without_files])
def test_a_worker_that_may_open_no_file_is_reported_with_the_remedy(
    dataset: CocoDetection, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]
) -> None:
    monkeypatch.setattr("dn_detr.data.loaders.pack", function)
    with pytest.raises(DatasetError, match="ulimit -n"):
        list(test_loader(dataset))
    assert not workers()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's __del__
def test_workers_that_find_no_room_to_start_are_reported_with_the_remedy(
    dataset: CocoDetection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")  # as where /dev/shm has a few kilobytes

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", no_room)
    with pytest.raises(DatasetError, match=r"cannot start: .*No space.*Enlarge /dev/shm"):
        next(iter(test_loader(dataset)))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files as Linux shows them")
def test_loaders_leave_no_file_open(dataset: CocoDetection) -> None:
    counts = []
    for _ in range(10):
        next(iter(test_loader(dataset)))
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[-1] < counts[0] + 10  # some are closed a moment later


_FULL = """
    import torch
    from dn_detr.data import DatasetError
    dataset.transforms = lambda sample, rng: {**sample, "map": torch.zeros(2**18)}
    try:
        list(build_test_loader(dataset, 7, num_workers=2))
    except DatasetError as error:
        print("Enlarge /dev/shm" in str(error))
"""


@slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs the right to mount a small /dev/shm",
)
def test_full_shared_memory_is_reported_and_not_waited_for(dataset: CocoDetection) -> None:
    script = textwrap.dedent(PROLOGUE).format(hazard="pass") + textwrap.dedent(_FULL)
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$@"'
    arguments = [sys.executable, script, str(dataset.image_dir), str(dataset.annotation_file)]
    finished = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert finished.stdout == "True\n", finished.stderr


def fail() -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_data_set_stays_what_it_is(dataset: CocoDetection, num_workers: int) -> None:
    with pytest.raises(RuntimeError, match="no such kernel"):
        list(build_test_loader(Hazardous(dataset, fail), 2, num_workers=num_workers))
    assert not workers()


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
    with pytest.raises(DatasetError, match=f"pid {victim.pid}: exit code -9"):
        for _ in range(8):
            next(batches)


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


def test_closing_an_iterator_ends_its_workers_in_the_middle_of_an_image(
    dataset: CocoDetection,
) -> None:
    batches = iter(test_loader(Hazardous(dataset, lambda: time.sleep(600))))
    next(batches)
    time.sleep(0.2)
    assert len(workers()) == 2
    start = time.monotonic()
    del batches
    assert not workers()
    assert time.monotonic() - start < 3


def test_each_evaluation_starts_its_own_workers(dataset: CocoDetection) -> None:
    loader = test_loader(dataset)
    for _ in range(2):
        assert sum(len(batch) for batch in loader) == 7
        assert not workers()


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


@slow
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
    assert time.monotonic() - start < 15  # multiprocessing alone would wait for ever


@slow
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
