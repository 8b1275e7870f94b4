"""Runs that are interrupted and resumed in new processes end as uninterrupted ones, to the bit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dn_detr.checkpoint import Snapshot, last_checkpoint, load_last_checkpoint
from tests.checkpoint.writing import save
from tools import make_digits

from .runs import Group, Run, outcome

# All that has a state: the EMA, a loss scale, the best result, log records that begin before a
# checkpoint and end after it.
EVERYTHING = (
    "train.amp.enabled=true",
    "train.amp.dtype=float16",
    "train.ema.enabled=true",
    "train.checkpoint.best=ema/AP",
    "train.checkpoint.period=2",
    "train.early_stopping.patience=100",
    "train.log_period=3",
)
ROOT = Path(__file__).resolve().parents[2]
WORKERS = "dataloader.train.num_workers={}".format
TERM, KILL = signal.SIGTERM, signal.SIGKILL
EXIT_CODES = {TERM: 75, KILL: -signal.SIGKILL}

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """The outcome of an uninterrupted run of 1 or 2 processes, without workers."""
    known: dict[int, dict[str, Any]] = {}

    def run(processes: int) -> dict[str, Any]:
        if processes not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            with started(folder, processes) as process:
                process.succeed()
            known[processes] = outcome(folder)
        return known[processes]

    return run


@contextmanager
def started(
    folder: Path, processes: int, *arguments: str, pause: str = ""
) -> Iterator[Run | Group]:
    with (
        Run(folder, *EVERYTHING, *arguments, pause=pause)
        if processes == 1
        else Group(folder, *EVERYTHING, *arguments, pauses=(pause, pause))
    ) as process:
        yield process


def interrupt(folder: Path, processes: int, *arguments: str, pause: str, number: int) -> None:
    """Start a run, and send a signal to all of its processes when they are at a place."""
    with started(folder, processes, *arguments, pause=pause) as process:
        members = process.runs if isinstance(process, Group) else [process]
        # the main process alone saves
        waiting = members[:1] if pause.startswith("saving") else members
        for member in waiting:
            member.reach_pause()
        for member in members:
            member.signal(number)
        for member in members:
            member.go_on()
        assert [member.wait() for member in members] == [EXIT_CODES[number]] * len(members)


@pytest.mark.parametrize(
    ("place", "number", "workers", "options"),
    [
        ("step 5", TERM, (0, 2), ()),
        ("saving 4", KILL, (0, 0), ()),
        pytest.param("step 5", KILL, (2, 0), (), marks=slow),
        pytest.param("step 5", KILL, (0, 0), (), marks=slow),
        pytest.param("step 5", TERM, (2, 2), (), marks=slow),
        pytest.param("step 1", TERM, (0, 0), (), marks=slow),
        pytest.param("image of epoch 1", TERM, (2, 0), (), marks=slow),
        pytest.param("image of epoch 1", KILL, (0, 2), (), marks=slow),
        pytest.param("evaluation 1", TERM, (2, 2), (), marks=slow),
        pytest.param("evaluation 2", KILL, (0, 0), (), marks=slow),
        pytest.param("evaluation 3", TERM, (0, 0), (), marks=slow),  # the last
        pytest.param("saving 4", TERM, (2, 2), (), marks=slow),
        pytest.param(
            "saving 6", TERM, (0, 0), ("train.checkpoint.asynchronous=false",), marks=slow
        ),
        pytest.param(
            "saving 6", KILL, (2, 2), ("train.checkpoint.asynchronous=false",), marks=slow
        ),
    ],
)
def test_one_process_resumes_exactly(tmp_path, whole, place, number, workers, options):
    folder = tmp_path / "run"
    before, after = map(WORKERS, workers)
    interrupt(folder, 1, before, *options, pause=place, number=number)
    with started(folder, 1, after, *options, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == whole(1)


@pytest.mark.parametrize(
    ("place", "number", "workers", "options"),
    [
        ("step 5", TERM, (0, 0), ()),
        pytest.param("step 5", KILL, (2, 0), (), marks=slow),
        pytest.param("image of epoch 1", TERM, (0, 2), (), marks=slow),
        pytest.param("evaluation 2", TERM, (0, 0), (), marks=slow),
        pytest.param("evaluation 2", KILL, (0, 0), (), marks=slow),
        pytest.param(
            "saving 4", TERM, (0, 0), ("train.checkpoint.asynchronous=false",), marks=slow
        ),
        pytest.param("saving 4", KILL, (2, 2), (), marks=slow),
    ],
)
def test_two_processes_resume_exactly(tmp_path, whole, place, number, workers, options):
    folder = tmp_path / "run"
    before, after = map(WORKERS, workers)
    interrupt(folder, 2, before, *options, pause=place, number=number)
    with started(folder, 2, after, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == whole(2)


@slow
def test_three_processes_resume_exactly(tmp_path):
    """The order in which three numbers are added shows, unlike that of two."""
    places = ("step 5",) * 3
    options = ("train.log_period=1",)
    with Group(tmp_path / "whole", *options, pauses=("",) * 3) as group:
        group.succeed()
    with Group(tmp_path / "run", *options, pauses=places) as group:
        for run in group.runs:
            run.reach_pause()
        group.runs[0].signal(TERM)
        for run in group.runs:
            run.go_on()
        assert group.wait() == [EXIT_CODES[TERM]] * 3
    with Group(tmp_path / "run", *options, "--resume", pauses=("",) * 3) as group:
        group.succeed()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_may_be_interrupted_again_and_again(tmp_path, whole, processes):
    folder = tmp_path / "run"
    interrupt(folder, processes, pause="step 2", number=TERM)
    interrupt(folder, processes, "--resume", WORKERS(2), pause="step 2", number=KILL)
    interrupt(folder, processes, "--resume", pause="evaluation 2", number=TERM)
    with started(folder, processes, "--resume", WORKERS(2)) as resumed:
        resumed.succeed()
    assert outcome(folder) == whole(processes)


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_equal_seeds_give_equal_digests_with_any_number_of_workers(tmp_path, whole, processes):
    with started(tmp_path / "a", processes, WORKERS(2)) as run:
        run.succeed()
    assert outcome(tmp_path / "a") == whole(processes)
    with started(tmp_path / "b", processes, "train.seed=1") as run:
        run.succeed()
    different = outcome(tmp_path / "b")["digests"]
    assert all(different[name] != digest for name, digest in whole(processes)["digests"].items())


@slow
def test_the_results_of_a_checkpoint_that_was_saved_for_them_count_once(tmp_path):
    """`best` is saved after the evaluation, other checkpoints before it."""
    options = (
        "train.checkpoint.period=100",
        "train.max_iter=8",
        "train.checkpoint.best=AP",
        "train.checkpoint.asynchronous=false",  # so that the best is on the disk at the next step
    )
    with started(tmp_path / "whole", 1, *options) as run:
        run.succeed()
    assert outcome(tmp_path / "whole")["best"] == "0000006"
    interrupt(tmp_path / "run", 1, *options, pause="step 7", number=KILL)
    assert last_checkpoint(tmp_path / "run").name == "0000006"
    with started(tmp_path / "run", 1, *options, "--resume") as resumed:
        resumed.succeed()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@slow
def test_a_real_detector_resumes_exactly(tmp_path):
    pytest.importorskip("sklearn")
    data = tmp_path / "digits"
    assert make_digits.main(["--root", str(data), "--num-train", "32", "--num-val", "8"]) == 0
    overrides = (
        f"dataloader.root={data}",
        "train.device=cpu",
        "train.max_iter=6",
        "train.checkpoint.period=2",
        "train.ema.enabled=true",
        "train.log_period=3",
        "dataloader.train.total_batch_size=4",
    )
    config = str(ROOT / "configs" / "digits_dn_deformable_detr.py")
    with Run(tmp_path / "whole", *overrides, config=config) as whole:
        assert whole.wait() == 0, whole.log
    with Run(tmp_path / "run", *overrides, config=config) as run:
        run.wait_for_log("iteration 3/6")
        run.signal(KILL).wait()
    assert last_checkpoint(tmp_path / "run").name == "0000002"
    with Run(tmp_path / "run", *overrides, WORKERS(0), "--resume", config=config) as resumed:
        assert resumed.wait() == 0, resumed.log
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def _other_random_numbers(saved: Snapshot) -> None:
    random = saved.training_state["ranks"][0]["random"]
    random["torch"] = torch.Generator().manual_seed(1).get_state()


def _other_moments(saved: Snapshot) -> None:
    saved.optimizer["state"][0]["exp_avg"] *= 2


def _other_ema(saved: Snapshot) -> None:
    saved.ema["head.bias"] += 1e-3


def _no_log_record_begun(saved: Snapshot) -> None:
    saved.training_state["ranks"][0]["metrics"]["sums"].clear()


def _other_matching(saved: Snapshot) -> None:
    saved.training_state["callbacks"]["matching_stability"]["previous"].fill_(-1)


@pytest.mark.parametrize(
    "change",
    [
        _other_random_numbers,
        *(
            pytest.param(change, marks=slow)
            for change in (
                _other_moments,
                _other_ema,
                _no_log_record_begun,
                _other_matching,
                lambda saved: saved.training_state["scaler"].update(scale=2.0**10),
                lambda saved: saved.training_state.update(batches_drawn=3),
                lambda saved: saved.training_state["best"].update(reference=1e9),
                lambda saved: saved.training_state.update(nonfinite_steps=1),
            )
        ),
    ],
)
def test_a_run_that_resumes_with_another_state_ends_differently(tmp_path, whole, change):
    """The negative control: each entry of a checkpoint matters and would be missed."""
    folder = tmp_path / "run"
    interrupt(folder, 1, pause="step 5", number=TERM)
    last = load_last_checkpoint(folder)
    change(last.snapshot)
    save(folder, last.snapshot, config=last.manifest.config, class_names=last.manifest.class_names)
    with started(folder, 1, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) != whole(1)
