"""torchrun's agents in real processes, as they run on several nodes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from dn_detr.checkpoint import read_weights
from tests.tools.processes import (
    ROOT,
    assert_equal_weights,
    assert_success,
    start,
    wait_for_log,
)
from tests.tools.slurm_cluster import free_ports

CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")
SLOW_CONFIG = str(ROOT / "tests" / "tools" / "slow_config.py")
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


def test_two_nodes_give_the_weights_of_two_processes(tmp_path):
    assert_success(start(*train_net(tmp_path / "spawned", "--num-gpus", "2")))
    run_on_nodes([1, 1], tmp_path / "nodes")
    assert_equal_weights(tmp_path / "spawned", tmp_path / "nodes")


def test_nodes_with_two_and_one_processes_share_a_batch_of_four(tmp_path):
    # Adam would make whole steps out of rounding errors.
    overrides = ("model.dropout=0.0", "optimizer._target_=torch.optim.SGD")
    assert_success(start(*train_net(tmp_path / "one", *overrides)))
    run_on_nodes([2, 1], tmp_path / "three", *overrides)
    expected, found = read_weights(tmp_path / "one"), read_weights(tmp_path / "three")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_torchrun_starts_again_after_a_killed_worker_and_resumes_to_the_same_weights(tmp_path):
    command = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    arguments = ("--config-file", SLOW_CONFIG, "--resume", "train.checkpoint.period=5")
    assert_success(start(*command, *train_net(tmp_path / "whole", *arguments)))
    agent = start(*command, *train_net(tmp_path / "killed", *arguments, "model.pause=0.3"))
    wait_for_log(tmp_path / "killed", "iteration 8/60")
    os.kill(worker(agent, local_rank=1), signal.SIGKILL)
    assert_success(agent)
    assert "resuming from" in (tmp_path / "killed" / "log.txt").read_text()
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed")
