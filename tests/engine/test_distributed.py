from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dn_detr.distributed import all_gather, barrier, rank, world_size
from dn_detr.engine import (
    LaunchError,
    ProcessFailure,
    evaluate_model,
    launch,
)
from dn_detr.engine.devices import choose_device
from dn_detr.errors import UserError


def write_identity(folder: str) -> None:
    everyone = all_gather((rank(), world_size()))
    Path(folder, f"{rank()}.txt").write_text(f"{everyone}")
    barrier()


class NoImages:
    """Loader and evaluator in one, of a test set without images."""

    dataset = ()
    batch_size = 1

    def __iter__(self):
        return iter(())

    def reset(self, dataset) -> None:
        pass

    def evaluate(self) -> None:
        return None


def evaluate_with_other_statistics(folder: str) -> None:
    model = torch.nn.BatchNorm1d(1)
    model.running_mean.fill_(rank() + 1.0)
    evaluate_model(model, NoImages(), NoImages())
    Path(folder, f"{rank()}.txt").write_text(f"{model.running_mean.item()}")
    barrier()


def fail_on_one_process(kind: str) -> None:
    if rank() == 1:
        if kind == "user":
            raise UserError("lr=0: expected > 0")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("from the depths")
    barrier()  # would wait for rank 1 for ever
    time.sleep(600)


def test_without_a_group_there_is_one_process():
    assert (rank(), world_size(), all_gather("x")) == (0, 1, ["x"])
    barrier()


def test_launch_of_one_process_runs_here(tmp_path):
    launch(write_identity, None, str(tmp_path))
    assert (tmp_path / "0.txt").read_text() == "[(0, 1)]"


def test_launched_processes_know_each_other(tmp_path):
    launch(write_identity, 2, str(tmp_path), device="cpu")
    for number in (0, 1):
        assert (tmp_path / f"{number}.txt").read_text() == "[(0, 2), (1, 2)]"


def test_all_processes_evaluate_with_the_statistics_of_the_first(tmp_path):
    launch(evaluate_with_other_statistics, 2, str(tmp_path), device="cpu")
    for number in (0, 1):
        assert (tmp_path / f"{number}.txt").read_text() == "1.0"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", LaunchError, "^lr=0: expected > 0$"),
        ("bug", ProcessFailure, "^rank 1:\nTraceback[\\s\\S]*RuntimeError: from the depths"),
    ],
)
def test_one_failing_process_ends_all_and_its_error_is_told_once(kind, error, message):
    with pytest.raises(error, match=message) as caught:
        launch(fail_on_one_process, 2, kind, device="cpu")
    assert str(caught.value).count("Traceback") == (kind == "bug")


def test_a_killed_rank_ends_all():
    with pytest.raises(ProcessFailure):
        launch(fail_on_one_process, 2, "killed", device="cpu")


def test_less_than_one_process_is_an_error():
    with pytest.raises(LaunchError, match=r"^--num-gpus 0: expected at least 1$"):
        launch(print, 0)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_gpus_than_there_are_is_an_error(device):
    count = torch.cuda.device_count() + 1
    with pytest.raises(LaunchError, match=f"--num-gpus {count}: this machine has {count - 1} GPU"):
        launch(print, count, device=device)


def test_torchrun_and_another_number_of_processes_is_an_error(monkeypatch):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**variables, **address}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(LaunchError, match="--num-gpus 4 under torchrun with 2 processes"):
        launch(print, 4, device="cpu")


@pytest.mark.parametrize("name", ["gpu", "tpu", "mps", ""])
def test_unknown_device_is_an_error(name):
    with pytest.raises(ValueError, match="expected auto, cpu, cuda"):
        choose_device(name)


def test_auto_takes_the_gpu_where_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
