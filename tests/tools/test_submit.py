"""The submission, and a job that runs on this machine without Slurm."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from dn_detr.engine.cluster import PYTHON_COMMAND, SubmissionError, parse_minutes
from tests.engine.runs import run_tool
from tests.tools.processes import (
    SLOW_CONFIG,
    assert_equal_weights,
    start,
    wait_for_log,
)
from tools import train_net
from tools.submit import main

COMMAND = ["--config-file", SLOW_CONFIG, "--time", "10"]
ON_CPUS = ["--processes-per-node", "2"]
ON_THIS_MACHINE = [*COMMAND, "--processes-per-node", "1", "--cluster", "local"]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("5:01", 6),
        ("24:00:00", 1440),
        ("1:30:30", 91),
        ("2-12", 3600),
        ("1-0:30", 1470),
        ("1-0:0:1", 1441),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, minutes):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(SubmissionError, match="expected minutes"):
        parse_minutes(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ON_CPUS, "train.output_dri=x"], "did you mean train.output_dir?"),
        ([*ON_CPUS, "train.epochs=many"], "train.epochs"),
        ([*ON_CPUS, "--config-file", "no_such_model"], "no config file 'no_such_model'"),
        (["--gpus-per-node", "2"], "train.device=cpu uses no GPUs"),
        ([*ON_CPUS, "train.device=cuda"], "train.device=cuda needs GPUs"),
        ([*ON_CPUS, "--time", "soon"], "time limit 'soon'"),
        ([*ON_CPUS, "--save-before", "600"], "leaves nothing to train"),
        ([*ON_CPUS, "--nodes", "0"], "nodes: 0"),
        (
            [*ON_CPUS, "--nodes", "2", "dataloader.train.total_batch_size=3"],
            "total_batch_size=3 leaves some of 4 processes without an image: set 4 or more",
        ),
        ([*ON_CPUS, "--cluster", "local", "--nodes", "2"], "one node, not 2"),
    ],
)
def test_a_mistake_is_found_before_anything_is_queued(tmp_path, capsys, arguments, message):
    assert main([*COMMAND, f"train.output_dir={tmp_path}/run", *arguments]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and said.out == ""
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_machine_without_slurm_is_one_clear_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*COMMAND, *ON_CPUS, f"train.output_dir={tmp_path}/run"]) == 1
    assert "sbatch is not on the PATH" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_during_the_imports_of_a_job_waits_for_the_training():
    program = (
        "import os, signal, time; os.kill(os.getpid(), signal.SIGUSR2); "
        "from dn_detr.engine import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    while stop.reason is None: time.sleep(0.01)\n"
        "    print(stop.reason)"
    )
    result = subprocess.run(
        f"{PYTHON_COMMAND} -c {shlex.quote(program)}", shell=True, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "SIGUSR2\n"), result.stderr


def submit_here(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return start("tools/submit.py", *ON_THIS_MACHINE, f"train.output_dir={folder}", *arguments)


@pytest.mark.slow
def test_a_killed_local_job_saves_and_the_same_command_finishes_it(tmp_path):
    whole = tmp_path / "whole"
    assert train_net.main([*COMMAND[:2], f"train.output_dir={whole}"]) == 0
    folder = tmp_path / "run"
    stopped = submit_here(folder, "model.pause=0.5")
    wait_for_log(folder, "iteration 4/60")
    [job_id] = {path.name.split("_")[0] for path in (folder / "slurm").glob("*_log.out")}
    os.kill(int(job_id), signal.SIGTERM)
    said, _ = stopped.communicate(timeout=600)
    assert stopped.returncode == 1 and "the same command continues it" in said

    again = run_tool("submit", *ON_THIS_MACHINE, f"train.output_dir={folder}")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in (folder / "log.txt").read_text()
    assert_equal_weights(whole, folder)
