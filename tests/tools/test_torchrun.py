"""torchrun's agents in real processes, as they run on several nodes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engine.runs import Run
from tests.tools.processes import (
    ROOT,
    SLOW_CONFIG,
    assert_equal_weights,
    assert_success,
    start,
    wait_for_log,
)
from tests.tools.slurm_cluster import free_ports

CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")
TORCHRUN = ("-m", "torch.distributed.run")

pytestmark = pytest.mark.slow


def train_net(folder: Path, *arguments: str) -> tuple[str, ...]:
    """The command without Python; a later --config-file wins."""
    script = str(ROOT / "tools" / "train_net.py")
    return (script, "--config-file", CONFIG, f"train.output_dir={folder}", *arguments)


def run_on_nodes(processes: list[int], folder: Path, *arguments: str) -> None:
    """One agent for each node, with so many processes."""
    [port] = free_ports(1)
    agents = [
        start(
            *TORCHRUN, f"--nnodes={len(processes)}", f"--node-rank={node}",
            f"--nproc-per-node={count}", "--master-addr=127.0.0.1", f"--master-port={port}",
            *train_net(folder, *arguments),
        )
        for node, count in enumerate(processes)
    ]  # fmt: skip
    assert_success(*agents)


def worker(agent: subprocess.Popen[str], local_rank: int) -> int:
    """Process id of one of torchrun's workers."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    mark = f"LOCAL_RANK={local_rank}".encode()
    [found] = [
        int(child)
        for child in children
        if mark in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    return found


def test_two_nodes_give_the_weights_of_as_many_ranks_on_one(tmp_path):
    # Of a batch of four, three ranks take two, one and one images.
    with Run(tmp_path / "spawned", "--num-gpus", "3") as spawned:
        spawned.succeed()
    run_on_nodes([2, 1], tmp_path / "nodes")
    assert_equal_weights(tmp_path / "spawned", tmp_path / "nodes")


def test_torchrun_starts_again_after_a_killed_worker_and_resumes_to_the_same_weights(
    tmp_path, uninterrupted
):
    arguments = ("--config-file", SLOW_CONFIG, "--resume", "train.checkpoint.period=5")
    agent = start(
        *TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        *train_net(tmp_path, *arguments, "model.pause=0.3"),
    )  # fmt: skip
    wait_for_log(tmp_path, "iteration 10/60")  # the checkpoint of 5 is written
    os.kill(worker(agent, local_rank=1), signal.SIGKILL)
    assert_success(agent)
    assert "resuming from" in (tmp_path / "log.txt").read_text()
    assert_equal_weights(uninterrupted, tmp_path)
