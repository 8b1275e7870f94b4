"""Jobs on a real Slurm cluster, which the tests start on this machine."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from dn_detr.engine.cluster import ClusterJob
from tests.engine.runs import wait_until
from tests.tools.processes import ENVIRONMENT, SLOW_CONFIG, assert_equal_weights
from tests.tools.slurm_cluster import SlurmCluster, missing_requirement
from tools.submit import main

SLOW = "model.pause=1.0"  # a minute of training
ALONE = ("--processes-per-node", "1")  # where the number of processes adds nothing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if reason := missing_requirement():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as folder,  # short: a socket lies there
        SlurmCluster(Path(folder)) as cluster,
    ):
        yield cluster


def submit(cluster: SlurmCluster, folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of tools/submit.py.

    In this process, because importing torch takes seconds; sbatch and the jobs inherit the
    environment.
    """
    command = [
        "--config-file",
        SLOW_CONFIG,
        "--processes-per-node",
        "2",
        "--time",
        "10",
        *arguments,
    ]
    said = io.StringIO()
    with (
        patch.dict(os.environ, {**cluster.environment, **ENVIRONMENT}),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        return main([*command, f"train.output_dir={folder}"]), said.getvalue()


class Job:
    """A submitted training of two processes in `folder`."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *arguments: str) -> None:
        self.cluster, self.folder = cluster, folder
        status, self.said = submit(cluster, folder, *arguments)
        assert status == 0, self.said
        self.id = re.search(r"job (\d+)", self.said)[1]

    def wait_for_iteration(self, iteration: int) -> None:
        wait_until(lambda: f"iteration {iteration}/60" in self.log(), self.log)

    def end(self) -> dict[str, str]:
        return self.cluster.wait_until_ended(self.id, self.log)

    def log(self) -> str:
        files = sorted((self.folder / "slurm").glob(f"{self.id}_*_log.out"))
        return "\n".join(path.read_text() for path in files)

    def assert_resumed_to(self, uninterrupted: Path) -> None:
        """It was interrupted and went on as if it had not been."""
        job, log = self.end(), self.log()
        assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, log
        assert "resuming from" in log
        assert_equal_weights(uninterrupted, self.folder)


def test_a_job_trains_like_num_gpus_and_completes(cluster, tmp_path, uninterrupted):
    job = Job(cluster, tmp_path, "--cpus-per-gpu", "1")
    assert f"scancel {job.id}" in job.said
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), job.log()
    assert_equal_weights(uninterrupted, tmp_path)


def test_a_job_at_its_time_limit_saves_and_resumes_to_the_same_weights(
    cluster, tmp_path, uninterrupted
):
    job = Job(cluster, tmp_path, "--time", "1", "--save-before", "15", SLOW)
    cluster.wait_for(job.id, lambda state: state["Restarts"] != "0", job.log)
    job.assert_resumed_to(uninterrupted)


@pytest.mark.parametrize("partition", ["low", "lowest"])  # with 30 seconds of grace, and without
def test_a_preempted_job_saves_and_resumes_to_the_same_weights(
    cluster, tmp_path, uninterrupted, partition
):
    job = Job(cluster, tmp_path, "--partition", partition, SLOW)
    job.wait_for_iteration(4)
    urgent = cluster.run(
        "sbatch",
        "--partition=high",
        "--exclusive",
        "--chdir=/",
        "--output=/dev/null",
        "--wrap=true",
    )
    cluster.wait_until_ended(urgent.stdout.split()[-1], job.log)
    job.assert_resumed_to(uninterrupted)


def test_a_job_whose_node_fails_resumes_to_the_same_weights(cluster, tmp_path, uninterrupted):
    job = Job(cluster, tmp_path, "train.checkpoint.period=5", SLOW)
    job.wait_for_iteration(10)  # the checkpoint of 5 is written
    cluster.lose_node(job.id)
    job.assert_resumed_to(uninterrupted)


def test_a_process_that_outlives_a_restart_does_not_queue_the_job_again(cluster):
    sleeping = cluster.run("sbatch", "--chdir=/", "--output=/dev/null", "--wrap=sleep 600")
    job_id = sleeping.stdout.split()[-1]
    cluster.wait_for(job_id, lambda state: state["JobState"] == "RUNNING")
    cluster.run("scontrol", "requeue", job_id)
    cluster.wait_for(
        job_id, lambda state: (state["JobState"], state["Restarts"]) == ("RUNNING", "1")
    )
    process = {**cluster.environment, "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": job_id}
    job = ClusterJob("train_net.py", ())
    with patch.dict(os.environ, {**process, "SLURM_RESTART_COUNT": "0"}):
        assert job.checkpoint() is None
    with patch.dict(os.environ, {**process, "SLURM_RESTART_COUNT": "1"}):
        assert job.checkpoint() is not None
    cluster.run("scancel", job_id)
    with patch.dict(os.environ, {**process, "SLURM_RESTART_COUNT": "1"}):
        assert job.checkpoint() is None


def test_a_cancelled_job_saves_and_does_not_start_again(cluster, tmp_path):
    job = Job(cluster, tmp_path, *ALONE, SLOW)
    job.wait_for_iteration(4)
    cluster.run("scancel", job.id)
    state = job.end()
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    assert (tmp_path / "checkpoints" / "last").exists(), job.log()


def test_a_job_starts_again_as_often_as_allowed(cluster, tmp_path):
    job = Job(cluster, tmp_path, *ALONE, "--max-requeues", "0", SLOW)
    job.wait_for_iteration(4)
    cluster.run("scancel", "--signal=USR2", job.id)
    state = job.end()
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "1:0")
    assert "Job not requeued because: timed-out too many times" in job.log()


def test_a_job_that_crashes_does_not_start_again(cluster, tmp_path):
    job = Job(cluster, tmp_path, *ALONE, "model.nan_at=2")
    state = job.end()
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("FAILED", "0", "1:0")
    assert "loss terms loss_class not finite" in job.log()


def test_what_slurm_refuses_is_one_clear_message(cluster, tmp_path):
    status, said = submit(cluster, tmp_path, "--partition", "absent")
    assert status == 1
    assert said.startswith("error: Slurm refused the job: ") and "invalid partition" in said
