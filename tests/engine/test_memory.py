"""Memory that runs out for real: told with what helps, or survived as if the step were left out."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest
import torch

from dn_detr.distributed import rank
from dn_detr.engine import OutOfMemory, launch, train
from dn_detr.engine.memory import is_out_of_memory

from .faults import ADDRESSABLE
from .reference import assert_weights, images_of_batch, rows, train_by_hand
from .runs import run_python
from .small import HUGE_SIDE, PLAIN, SMALL_CONFIG, small_run

DENSE = "dn_detr_r50"
TRAINABLE_NORM = [
    "model.model.backbone.batch_norm=trainable",
    "model.model.backbone.frozen_stages=0",
]
HUNGRY_BACKWARD = ["model.kind=hungry_backward", f"model.bad_images={images_of_batch(3)[1:2]}"]
HUGE_IMAGE = images_of_batch(3)[1]  # on two processes the second one's
WITH_HUGE_IMAGE = f"dataloader.train.dataset.huge_images=[{HUGE_IMAGE - 1}]"


def limit_memory(mib: int = 1400) -> None:
    """Let this process take so much more address space than it has now.

    Of it, 400 MiB are enough without the huge image, which takes 1500 more; what that had may stay
    taken, though empty.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def error_of(allocate) -> BaseException:
    with pytest.raises(Exception) as caught:
        allocate()
    return caught.value


def test_what_the_allocators_say_is_recognised():
    assert is_out_of_memory(error_of(lambda: torch.empty(ADDRESSABLE, dtype=torch.uint8)))
    assert is_out_of_memory(error_of(lambda: bytearray(ADDRESSABLE)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(error_of(lambda: torch.empty(2) + torch.empty(3)))
    assert not is_out_of_memory(error_of(lambda: torch.empty(-1)))


@pytest.mark.parametrize("kind", ["hungry_forward", "hungry_backward"])
def test_running_out_of_memory_is_told_with_the_batch_and_what_helps(kind, tmp_path):
    bad = images_of_batch(1)
    with pytest.raises(OutOfMemory) as error:
        train(small_run(tmp_path, f"model.kind={kind}", f"model.bad_images={bad[:1]}"))
    message = str(error.value)
    assert "iteration 1: out of memory on cpu" in message and "can't allocate memory" in message
    assert "a batch of 4 images, padded to (4, 3, 48, 64):" in message
    index = bad[0] - 1
    height = 40 if index % 2 else 48
    assert f"images/{index}.jpg: (3, {height}, 64), {index % 4} objects" in message
    for remedy in ("train.accumulate=2", "train.activation_checkpointing.encoder=true",
                   "model.denoising.max_queries", "train.oom=skip"):  # fmt: skip
        assert remedy in message


def test_a_step_that_did_not_fit_is_as_if_it_had_been_left_out(tmp_path):
    """It fails in the backward pass, when running statistics have changed already."""
    common = [*HUNGRY_BACKWARD, *TRAINABLE_NORM, "train.max_iter=5"]
    cfg = small_run(tmp_path, *common, "train.oom=skip", "train.ema.enabled=true")
    train(cfg)
    weights, averages = train_by_hand(cfg, [1, 2, 4, 5])
    assert_weights(tmp_path / "checkpoints/last", weights)
    assert_weights(tmp_path / "checkpoints/last/ema.safetensors", averages, rounding=1e-6)
    losses = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["oom_steps"] for row in losses] == [0, 0, 1, 0, 0]
    assert "the step is skipped (train.oom=skip)" in (tmp_path / "log.txt").read_text()


def test_ten_steps_in_a_row_without_memory_end_the_run(tmp_path):
    every_image = f"model.bad_images={list(range(1, 33))}"
    hungry = ["model.kind=hungry_forward", every_image, "train.oom=skip", "train.max_iter=12"]
    with pytest.raises(OutOfMemory, match="10 steps in a row did not fit"):
        train(small_run(tmp_path, *hungry))
    assert [row["oom_steps"] for row in rows(tmp_path)] == [1] * 9


COMMAND = """
import sys
from tests.engine.test_memory import limit_memory
from tools import train_net
limit_memory()
sys.exit(train_net.main(sys.argv[1:]))
"""


def run_limited(*overrides: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that may take 1400 MiB more."""
    arguments = ["--config-file", SMALL_CONFIG, WITH_HUGE_IMAGE, "train.max_iter=4"]
    return run_python(COMMAND, *arguments, *overrides)


@pytest.mark.slow
def test_the_command_reports_a_huge_image_and_ends_with_1(tmp_path):
    ended = run_limited(f"train.output_dir={tmp_path}")
    assert ended.returncode == 1, ended.stderr
    assert "error: iteration 3: out of memory on cpu" in ended.stderr
    assert f"images/{HUGE_IMAGE - 1}.jpg: (3, {HUGE_SIDE}, {HUGE_SIDE})" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_command_skips_a_huge_image_where_asked(tmp_path):
    ended = run_limited(f"train.output_dir={tmp_path}", "train.oom=skip")
    assert ended.returncode == 0, ended.stderr
    weights, _ = train_by_hand(small_run(tmp_path), [1, 2, 4])
    assert_weights(tmp_path / "checkpoints/last", weights)


def run_on_two_processes(folder: str) -> None:
    """Only the second process runs out of memory: in its backward pass, and on a huge image."""
    common = [*PLAIN, "train.max_iter=4"]
    train(small_run(Path(folder, "raise"), *common, name=DENSE))
    train(small_run(Path(folder, "skip"), *common, "train.oom=skip", name=DENSE))
    backward = [*common, "train.oom=skip", *HUNGRY_BACKWARD]
    train(small_run(Path(folder, "backward"), *backward, name=DENSE))
    if rank() == 1:
        limit_memory()
    huge = [*common, "train.oom=skip", WITH_HUGE_IMAGE]
    train(small_run(Path(folder, "huge"), *huge, name=DENSE))
    train(small_run(Path(folder, "end"), *common, WITH_HUGE_IMAGE, name=DENSE))


@pytest.mark.slow
def test_processes_stay_in_step_when_one_runs_out_of_memory(tmp_path):
    with pytest.raises(ValueError, match="iteration 3: out of memory"):
        launch(run_on_two_processes, 2, str(tmp_path), device="cpu")
    cfg = small_run(tmp_path, *PLAIN, name=DENSE)
    whole, _ = train_by_hand(cfg, [1, 2, 3, 4])
    left_out, _ = train_by_hand(cfg, [1, 2, 4])
    for name, expected in (
        ("raise", whole), ("skip", whole), ("backward", left_out), ("huge", left_out),
    ):  # fmt: skip
        assert_weights(tmp_path / name, expected, rounding=2e-6)
    assert rows(tmp_path / "huge")[2]["oom_steps"] == 1
    assert "out of memory on another rank" in (tmp_path / "huge/log.txt").read_text()
