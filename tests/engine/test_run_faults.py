"""Full disks, folders that cannot be written to and damaged checkpoints, in whole runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dn_detr.checkpoint import last_checkpoint
from tests.unprivileged import unprivileged

from .runs import CONFIG, Group, Run, outcome, rows, wait_until

ROOT = Path(__file__).resolve().parents[2]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with Run(folder) as run:
        run.succeed()
    return outcome(folder)


def last_error(run: Run) -> str:
    """What the command says at its end, without a traceback."""
    found = re.search(r"^error( \(rank \d\))?: .*", run.log, re.MULTILINE | re.DOTALL)
    assert found is not None and "Traceback" not in found[0], run.log
    return found[0]


@pytest.mark.parametrize(
    "how",
    ["closed", pytest.param("full", marks=slow), pytest.param("without a reader", marks=slow)],
)
def test_an_output_that_cannot_be_written_changes_nothing(tmp_path, whole, how):
    folder = tmp_path / "run"
    with Run(folder, environment={"BROKEN_OUTPUT": how}) as run:
        assert run.wait() == 0
    assert outcome(folder) == whole
    with Run(tmp_path / "bad", "train.seed=-1", environment={"BROKEN_OUTPUT": how}) as run:
        assert run.wait() == 1
    with Run(tmp_path / "stopped", pause="step 5", environment={"BROKEN_OUTPUT": how}) as run:
        assert run.reach_pause().signal(signal.SIGTERM).go_on().wait() == 75


@pytest.mark.parametrize("options", [(), ("train.checkpoint.asynchronous=false",)])
def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path, whole, options):
    folder = tmp_path / "run"
    with Run(folder, *options, pause="step 5,step 8") as run:
        run.reach_pause()
        wait_until(lambda: last_checkpoint(folder) is not None)
        run.limit_file_size(2000)
        run.go_on().reach_pause().wait_for_log("checkpoint 0000006 was not saved")
        assert last_checkpoint(folder).name == "0000003"
        run.limit_file_size(None)
        run.go_on().succeed()
        assert (
            "ERROR" in run.log and "training goes on, and the next checkpoint is tried" in run.log
        )
    found, expected = outcome(folder)["digests"], dict(whole["digests"])
    # the training state says which best result has a checkpoint, and that of 6 has none
    assert found.pop("training_state") != expected.pop("training_state")
    assert found == expected
    assert rows(folder) == whole["rows"]
    assert not (folder / "checkpoints" / "0000006").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=slow)])
def test_a_run_whose_last_checkpoint_cannot_be_written_fails(tmp_path, whole, processes):
    folder = tmp_path / "run"
    pause = "step 8"
    with (
        Run(folder, pause=pause)
        if processes == 1
        else Group(folder, pauses=(pause, pause)) as started
    ):
        members = started.runs if isinstance(started, Group) else [started]
        for run in members:
            run.reach_pause()
        members[0].wait_for_checkpoint(6)
        for run in members:
            run.limit_file_size(2000)
        for run in members:
            run.go_on()
        assert members[0].wait() == 1
        assert "checkpoint 0000009 was not saved" in last_error(members[0])
    assert last_checkpoint(folder).name == "0000006"
    if processes == 1:
        with Run(folder, "--resume") as resumed:
            resumed.succeed()
        assert outcome(folder) == whole


def test_a_stop_whose_checkpoint_cannot_be_written_fails(tmp_path, whole):
    folder = tmp_path / "run"
    with Run(folder, pause="step 5") as run:
        run.reach_pause().limit_file_size(2000).signal(signal.SIGTERM)
        assert run.go_on().wait() == 1
        assert "checkpoint 0000005 was not saved" in last_error(run)
    with Run(folder, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == whole


def test_a_file_system_that_fills_up_does_not_end_the_training(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        folder = tmp_path / "run"
        ballast = tmp_path / "ballast"
        with Run(folder, pause="step 5,step 8") as run:
            run.reach_pause()
            with pytest.raises(OSError, match="No space left"), ballast.open("wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            run.go_on().reach_pause().wait_for_log("checkpoint 0000006 was not saved")
            ballast.unlink()
            run.go_on().succeed()
        assert last_checkpoint(folder).name == "0000009"
        assert [row["iteration"] for row in rows(folder) if "loss" in row] == [2, 4, 6, 8, 9]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 0), (("train.epochs=0",), 1), (("--no-such-option",), 2)]
)
def test_the_exit_code_tells_success_a_mistake_and_a_wrong_option_apart(tmp_path, arguments, code):
    """Those of signals are in test_signals.py."""
    with Run(tmp_path / "run", *arguments) as run:
        assert run.wait() == code
        assert "Traceback" not in run.log


def test_a_full_disk_at_the_start_is_one_clear_message(tmp_path, whole):
    folder = tmp_path / "run"
    with Run(folder, pause="start") as run:
        run.reach_pause().limit_file_size(100)
        assert run.go_on().wait() == 1
        assert "cannot be written to: File too large; free disk space" in last_error(run)
    with Run(folder, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == whole


def test_a_checkpoint_that_was_not_written_is_tried_again_when_the_run_ends(tmp_path, whole):
    folder = tmp_path / "run"
    option = "train.checkpoint.asynchronous=false"
    with Run(folder, option, pause="step 6,image of epoch 2") as run:
        run.reach_pause().limit_file_size(2000)
        run.go_on().reach_pause().wait_for_log("checkpoint 0000006 was not saved")
        run.limit_file_size(None).signal(signal.SIGTERM)
        assert run.wait() == 75
    assert last_checkpoint(folder).name == "0000006"
    with Run(folder, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == whole


def best(folder):
    return (folder / "checkpoints" / "best").resolve().name


def test_a_kill_between_a_best_result_and_its_link_loses_neither(tmp_path, whole):
    folder = tmp_path / "run"
    with Run(folder, pause="recording 6") as run:
        run.reach_pause().signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert best(folder) == "0000003" and whole["best"] == "0000006"
    with Run(folder, "--resume") as resumed:
        resumed.succeed()
    assert outcome(folder) == whole


def test_a_best_result_whose_checkpoint_was_not_written_does_not_count(tmp_path, whole):
    folder = tmp_path / "run"
    option = "train.checkpoint.asynchronous=false"  # so that the failure is told in the same step
    with Run(folder, option, pause="step 6,image of epoch 2") as run:
        run.reach_pause().wait_for_checkpoint(3).limit_file_size(2000)
        run.go_on().reach_pause().wait_for_log("checkpoint 0000006 was not saved")
        run.limit_file_size(None).go_on().succeed()
    assert whole["best"] == "0000006" and best(folder) == "0000009"


@slow
def test_a_run_that_stagnates_ends_with_a_checkpoint_and_its_results(tmp_path):
    overrides = ("train.early_stopping.patience=1", "train.checkpoint.period=100")
    with Run(tmp_path / "run", *overrides, "train.early_stopping.min_delta=1e9") as run:
        run.succeed()
    last = outcome(tmp_path / "run")
    assert last["iteration"] == 6 and last["results"]["AP"] == last["rows"][-1]["eval/AP"]


@slow
def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)
    script = str(ROOT / "tools" / "train_net.py")
    arguments = ("--config-file", CONFIG, f"train.output_dir={folder}")
    command = unprivileged(sys.executable, script, *arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60
    )
    assert done.returncode == 1
    message = f"error: train.output_dir={folder}: no permission to write there"
    assert done.stderr.strip() == message
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", *(pytest.param(n, marks=slow) for n in (
        "training_state.pt", "manifest.json"))],
)  # fmt: skip
def test_a_damaged_last_checkpoint_is_told_and_the_one_before_continues(tmp_path, whole, name):
    folder = tmp_path / "run"
    with Run(folder, pause="step 8") as run:
        run.reach_pause().wait_for_checkpoint(6)
        assert run.signal(signal.SIGKILL).wait() == -signal.SIGKILL
    last = last_checkpoint(folder)
    file = last / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with Run(folder, "--resume") as resumed:
        resumed.succeed()
        assert "the last checkpoint cannot be used" in resumed.log
        assert (
            str(file) in resumed.log and "0000003 is undamaged and is used instead" in resumed.log
        )
    assert outcome(folder) == whole


@slow
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    folder = tmp_path / "run"
    with Run(folder, "train.max_iter=3") as run:
        run.succeed()
    (folder / "checkpoints" / "0000003" / "model.safetensors").write_bytes(b"")
    with Run(folder, "--resume") as resumed:
        assert resumed.wait() == 1
        assert "none of the checkpoints can be used" in last_error(resumed)
