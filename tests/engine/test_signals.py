"""Signals reach real processes at every moment of a run: they save, exit in time, and resume."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dn_detr.checkpoint import last_checkpoint, read_manifest
from dn_detr.engine import StopRequest
from dn_detr.signals import STOP_SIGNALS, exit_when_signalled

from .runs import Group, Run, outcome, rows, wait_until

TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
STOPPED = 75
# A signal that comes so much later is another request.
ONE_REQUEST = 1.1

slow = pytest.mark.slow


def iteration(folder: Path) -> int:
    """Of the last checkpoint, which is verified."""
    return read_manifest(last_checkpoint(folder)).iteration


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcomes of uninterrupted runs of 1 and 2 processes."""
    folder = tmp_path_factory.mktemp("whole")
    with Run(folder / "one") as one:
        one.succeed()
    with Group(folder / "two") as two:
        two.succeed()
    return {1: outcome(folder / "one"), 2: outcome(folder / "two")}


def assert_resumes(folder: Path, expected: dict, processes: int = 1) -> None:
    with Run(folder, "--resume") if processes == 1 else Group(folder, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == expected


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n == USR1 else slow) for n in STOP_SIGNALS]
)
def test_a_signal_lets_the_step_end_and_saves(tmp_path, whole, number):
    with Run(tmp_path / "run", pause="step 5") as run:
        run.reach_pause().signal(number)
        time.sleep(0.2)
        assert run.go_on().wait() == STOPPED
        assert f"{number.name}: finishing this step and saving, for at most 60 s" in run.log
        assert f"stopped after iteration 5 ({number.name}); --resume continues" in run.log
        assert "Traceback" not in run.log
    assert iteration(run.folder) == 5
    assert_resumes(run.folder, whole[1])


@slow
def test_the_limit_of_cpu_time_that_the_kernel_repeats_is_one_request(tmp_path, whole):
    with Run(tmp_path / "run", pause="step 5") as run:
        run.reach_pause().signal(signal.SIGXCPU)
        time.sleep(ONE_REQUEST)
        run.signal(signal.SIGXCPU)
        time.sleep(0.2)
        assert run.go_on().wait() == STOPPED
    assert_resumes(run.folder, whole[1])


def test_a_run_under_nohup_ignores_the_end_of_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert stop.reason is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@slow
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("evaluation 2", signal.SIGINT),
        ("saving 6", TERM),
        ("start", USR1),
        ("start", signal.SIGUSR2),
    ],
)
def test_a_signal_to_all_processes_stops_evaluations_saving_and_starts(
    tmp_path, whole, place, number
):
    with Run(tmp_path / "run", "dataloader.train.num_workers=2", pause=place) as run:
        run.reach_pause()
        os.killpg(run.pid, number)  # with its workers, as from a terminal or a scheduler
        assert run.go_on().wait() == STOPPED
        assert "Traceback" not in run.log
    if place == "start":
        assert last_checkpoint(run.folder) is None
    else:
        assert iteration(run.folder) >= 6
    assert_resumes(run.folder, whole[1])


def test_a_process_that_opens_its_data_ends(tmp_path):
    with Run(tmp_path / "run", pause="start") as run:
        assert run.reach_pause().signal(TERM).wait() == STOPPED
        assert "SIGTERM: no step is in progress, exiting now" in run.log
    assert last_checkpoint(run.folder) is None


@slow
def test_a_resumed_process_that_opens_its_data_ends_and_loses_nothing(tmp_path, whole):
    with Run(tmp_path / "run", pause="step 5") as run:
        run.reach_pause().signal(TERM)
        assert run.go_on().wait() == STOPPED
    with Run(tmp_path / "run", "--resume", pause="start") as resumed:
        assert resumed.reach_pause().signal(USR1).wait() == STOPPED
    assert iteration(run.folder) == 5
    assert_resumes(run.folder, whole[1])


@slow
def test_one_process_that_waits_for_another_run_ends(tmp_path):
    with Run(tmp_path / "run", pause="step 5") as first:
        first.reach_pause()
        with Run(tmp_path / "run", "--resume") as second:
            wait_until(lambda: has_open(second.pid, ".lock"))
            assert second.signal(TERM).wait() == STOPPED
        first.go_on().succeed()


def has_open(pid: int, name: str) -> bool:
    """Whether a process has a file of this name open."""
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if file.readlink().name == name:
                return True
    return False


@slow
def test_two_processes_that_open_their_data_end(tmp_path):
    with Group(tmp_path / "run", pauses=("start", "start")) as group:
        for run in group.runs:
            run.reach_pause().signal(TERM)
        assert group.wait() == [STOPPED, STOPPED], group.log
        assert "no step is in progress, exiting now" in group.log


@slow
def test_a_signal_while_a_training_begins_is_not_lost():
    context = multiprocessing.get_context("fork")
    for index in range(100):
        is_ready = context.Event()
        process = context.Process(target=begin_and_wait_for_a_request, args=(is_ready,))
        process.start()
        is_ready.wait()
        time.sleep(2e-5 * index)
        os.kill(process.pid, TERM)
        process.join()
        assert process.exitcode in (STOPPED, 0)


def begin_and_wait_for_a_request(is_ready) -> None:
    exit_when_signalled()
    is_ready.set()
    time.sleep(1e-3)
    with StopRequest() as stop:
        wait_until(lambda: stop.reason is not None)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=slow), 6])
def test_one_process_stops_though_its_loader_hangs(tmp_path, whole, workers):
    overrides = f"dataloader.train.num_workers={workers}"
    with Run(tmp_path / "run", overrides, pause="image of epoch 1") as run:
        run.reach_pause().wait_for_checkpoint(3)  # workers are an epoch ahead
        time.sleep(0.2)
        os.killpg(run.pid, TERM)
        assert run.wait(20) == STOPPED  # torch alone would wait 5 seconds for each of the workers
        assert "Traceback" not in run.log
    assert_resumes(run.folder, whole[1])


@slow
def test_two_processes_stop_when_the_batch_of_a_slow_loader_arrives(tmp_path, whole):
    with Group(tmp_path / "run", pauses=("image of epoch 1", "")) as group:
        group.runs[0].reach_pause()
        for run in group.runs:
            run.signal(TERM)
        time.sleep(0.5)
        group.runs[0].go_on()
        assert group.wait() == [STOPPED, STOPPED]
    assert iteration(tmp_path / "run") == 4
    assert_resumes(tmp_path / "run", whole[2], processes=2)


@slow
def test_two_processes_end_after_the_grace_period_where_a_loader_hangs(tmp_path, whole):
    overrides = ("train.grace_seconds=1", "dataloader.train.num_workers=2")
    with Group(tmp_path / "run", *overrides, pauses=("image of epoch 1", "")) as group:
        group.runs[0].reach_pause().wait_for_checkpoint(3)  # workers are an epoch ahead
        time.sleep(0.2)
        started = time.monotonic()
        for run in group.runs:
            os.killpg(run.pid, TERM)
        assert group.wait() == [128 + TERM] * 2
        assert time.monotonic() - started > 1
        assert "no checkpoint within train.grace_seconds=1 (SIGTERM)" in group.log
    assert iteration(tmp_path / "run") == 3
    assert_resumes(tmp_path / "run", whole[2], processes=2)


@slow
@pytest.mark.parametrize(
    ("place", "signalled"),
    [("step 5", 1), ("evaluation 2", 0), ("evaluation 2", 1), ("saving 6", 1)],
)
def test_a_signal_to_one_process_stops_both(tmp_path, whole, place, signalled):
    pauses = (place, "" if place.startswith("saving") else place)
    with Group(tmp_path / "run", pauses=pauses) as group:
        for run, pause in zip(group.runs, pauses, strict=True):
            if pause:
                run.reach_pause()
        group.runs[signalled].signal(USR1)
        for run in group.runs:
            run.go_on()
        assert group.wait() == [STOPPED, STOPPED], group.log
        assert "Traceback" not in group.log
    assert_resumes(tmp_path / "run", whole[2], processes=2)


def test_a_request_that_arrives_several_times_at_several_processes_counts_once(tmp_path, whole):
    overrides = "dataloader.train.num_workers=2"
    with Group(tmp_path / "run", overrides, pauses=("step 5", "step 5")) as group:
        for run in group.runs:
            run.reach_pause()
        for _ in range(3):
            for run in group.runs:
                os.killpg(run.pid, TERM)  # once by a scheduler, again by a parent that passes it on
            time.sleep(0.2)
        for run in group.runs:
            run.go_on()
        assert group.wait() == [STOPPED, STOPPED], group.log
        assert group.log.count("SIGTERM: finishing this step") == 1
    assert_resumes(tmp_path / "run", whole[2], processes=2)


@slow
@pytest.mark.parametrize("number", [TERM, signal.SIGINT])
def test_a_second_signal_ends_a_stuck_step(tmp_path, number):
    with Run(tmp_path / "run", pause="step 5") as run:
        run.reach_pause().signal(TERM)
        time.sleep(ONE_REQUEST)
        run.signal(number)
        assert run.wait() == 128 + number
        assert f"a second signal ({number.name}): rank 0 exits without saving" in run.log
    assert iteration(run.folder) == 3


def test_a_second_signal_ends_a_process_that_waits_for_another_one(tmp_path, whole):
    with Group(tmp_path / "run", pauses=("step 5", "")) as group:
        stuck, waiting = group.runs
        stuck.reach_pause()
        time.sleep(0.3)  # until the other one waits for the gradients
        waiting.signal(TERM)
        time.sleep(ONE_REQUEST)
        waiting.signal(TERM)
        assert waiting.wait() == 128 + TERM
        # The one that is left notices, and does not wait for ever.
        assert stuck.go_on().wait() == 1
    assert iteration(tmp_path / "run") == 3
    assert_resumes(tmp_path / "run", whole[2], processes=2)


@slow
def test_a_second_signal_ends_a_process_inside_a_call_of_a_library(tmp_path):
    with Run(tmp_path / "run", pause="step 5", environment={"PAUSE_IN_C": "1"}) as run:
        run.reach_pause()
        time.sleep(0.3)
        run.signal(TERM)
        time.sleep(ONE_REQUEST)
        run.signal(TERM)
        assert run.wait() == 128 + TERM
    assert iteration(run.folder) == 3


@slow
def test_a_second_signal_ends_a_step_without_limit_of_grace(tmp_path):
    with Run(tmp_path / "run", "train.grace_seconds=inf", pause="step 5") as run:
        run.reach_pause().signal(TERM)
        time.sleep(ONE_REQUEST)
        run.signal(TERM)
        assert run.wait() == 128 + TERM
        assert "Traceback" not in run.log


@slow
def test_a_second_signal_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, whole):
    with Run(tmp_path / "run", pause="saving 6") as run:
        run.reach_pause().signal(TERM)
        time.sleep(ONE_REQUEST)
        run.signal(TERM)
        assert run.wait() == 128 + TERM
    assert iteration(run.folder) == 3
    assert_resumes(run.folder, whole[1])


@slow
def test_a_second_signal_after_saving_costs_nothing(tmp_path, whole):
    with Run(tmp_path / "run", pause="step 5,end") as run:
        run.reach_pause().signal(TERM)
        time.sleep(0.2)
        run.go_on().reach_pause()
        time.sleep(ONE_REQUEST)
        run.signal(TERM)
        assert run.wait() == STOPPED
        assert "without saving" not in run.log
    assert iteration(run.folder) == 5
    assert_resumes(run.folder, whole[1])


@slow
@pytest.mark.parametrize("environment", [{}, {"PAUSE_IN_C": "1"}])
def test_a_step_that_does_not_end_is_ended_after_the_grace_period(tmp_path, environment):
    settings = "train.grace_seconds=0.5"
    with Run(tmp_path / "run", settings, pause="step 5", environment=environment) as run:
        run.reach_pause()
        time.sleep(0.3)
        started = time.monotonic()
        assert run.signal(USR1).wait() == 128 + USR1
        assert time.monotonic() - started > 0.5
        assert "no checkpoint within train.grace_seconds=0.5 (SIGUSR1)" in run.log
    assert iteration(run.folder) == 3


@slow
def test_the_grace_period_does_not_limit_periodic_saving(tmp_path):
    overrides = ("train.checkpoint.asynchronous=false", "train.grace_seconds=0.3")
    with Group(tmp_path / "run", *overrides, pauses=("saving 3", "")) as group:
        group.runs[0].reach_pause()
        time.sleep(1.5)  # a slow disk
        group.runs[0].go_on()
        group.succeed()
        assert "ERROR" not in group.log
    assert (tmp_path / "run" / "checkpoints" / "0000003").exists()


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_time_limit_stops_and_saves(tmp_path, whole, processes):
    limit = "train.max_hours=1e-6"
    folder = tmp_path / "run"
    with Run(folder, limit) if processes == 1 else Group(folder, limit) as limited:
        assert limited.wait() in (STOPPED, [STOPPED, STOPPED])
        assert "stopped after iteration 1 (train.max_hours=1e-06); --resume" in limited.log
    assert iteration(folder) == 1
    assert_resumes(folder, whole[processes], processes)


@slow
def test_a_killed_process_ends_the_other_one(tmp_path, whole):
    with Group(tmp_path / "run", pauses=("step 5", "")) as group:
        killed, other = group.runs
        killed.reach_pause().signal(signal.SIGKILL)
        assert (killed.wait(), other.wait()) == (-signal.SIGKILL, 1)
        assert "iteration 5 lost the connection to another rank" in other.log
        assert "error (rank 1): rank 1 lost its connection to another rank, which was" in other.log
        assert ".jpg" not in other.log and "Traceback" not in other.log
    assert_resumes(tmp_path / "run", whole[2], processes=2)


@slow
def test_a_signal_after_the_last_step_does_not_undo_the_end(tmp_path, whole):
    with Run(tmp_path / "run", pause="saving 9") as run:
        run.reach_pause().signal(TERM)
        assert run.go_on().wait() in (0, STOPPED)
    assert_resumes(run.folder, whole[1])
    assert rows(run.folder)[-1]["iteration"] == 9
