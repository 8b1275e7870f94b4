"""A batch computed in micro-batches is the batch computed as one, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dn_detr.config import instantiate
from dn_detr.engine import TrainingStep, launch, train
from dn_detr.engine.settings import AmpSettings, ClipGradSettings

from .reference import assert_weights, rows, train_by_hand
from .small import PLAIN, DrawnScenes, small_detector, small_run

DENSE, DEFORMABLE = "dn_detr_r50", "dn_deformable_detr_r50"
EIGHT = ["dataloader.train.total_batch_size=8", "train.max_iter=2"]


def step_of(accumulate: int, *, dtype: str | None = None, images: tuple[int, ...] = (3, 1, 4, 2)):
    """Gradients and losses of one step over these images, of which the one with 4 is empty."""
    torch.manual_seed(0)
    model = instantiate(small_detector(DENSE)).train()
    step = TrainingStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        device=torch.device("cpu"),
        amp=AmpSettings(enabled=dtype is not None, dtype=dtype or "float16"),
        clip_grad=ClipGradSettings(None),
        accumulate=accumulate,
    )
    if step.scaler.is_enabled():
        step.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # small enough for this model
    data = DrawnScenes()
    return step([data[index] for index in images], 1), model.state_dict(), step


@pytest.mark.parametrize("name", [DENSE, pytest.param(DEFORMABLE, marks=pytest.mark.slow)])
def test_two_micro_batches_of_four_are_a_batch_of_eight(name, tmp_path):
    train(small_run(tmp_path / "whole", *EIGHT, name=name))
    train(small_run(tmp_path / "parts", *EIGHT, "train.accumulate=2", name=name))
    whole, parts = (rows(tmp_path / run)[0] for run in ("whole", "parts"))
    losses = {key for key in whole if key.startswith("loss")} | {"grad_norm"}
    assert {key: parts[key] for key in losses} == pytest.approx(
        {key: whole[key] for key in losses}, rel=1e-4
    )
    log = (tmp_path / "parts/log.txt").read_text()
    assert "each step: 8 images = 1 rank(s) x 2 micro-batch(es) of 4" in log
    assert "normalisation" not in log


@pytest.mark.parametrize("images", [(3, 1, 4, 2, 7), (4, 3), (4, 8)])
@pytest.mark.parametrize("accumulate", [2, 9])
def test_micro_batches_add_up_if_uneven_or_without_objects(accumulate, images):
    whole, expected, _ = step_of(1, images=images)
    result, weights, _ = step_of(accumulate, images=images)
    assert result.names == whole.names
    torch.testing.assert_close(result.losses, whole.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.grad_norm, whole.grad_norm, rtol=1e-3, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_micro_batches_in_float16_share_one_loss_scale():
    whole, expected, _ = step_of(1, dtype="float16")
    result, weights, step = step_of(2, dtype="float16")
    assert result.outcome == whole.outcome and step.scaler.get_scale() == 64.0
    torch.testing.assert_close(result.losses, whole.losses, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(result.grad_norm, whole.grad_norm, rtol=2e-2, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3)


def test_more_micro_batches_than_images_are_as_many_as_there_are_images(tmp_path):
    train(small_run(tmp_path, "train.accumulate=9", "train.max_iter=1"))
    log = (tmp_path / "log.txt").read_text()
    assert "each step: 4 images = 1 rank(s) x 4 micro-batch(es) of 1" in log
    assert "a rank has 4 images of a step, which are computed in 4 micro-batches" in log


def test_batch_statistics_of_micro_batches_are_warned_about(tmp_path):
    trainable = [
        "model.model.backbone.batch_norm=trainable",
        "model.model.backbone.frozen_stages=0",
    ]
    train(small_run(tmp_path, *trainable, "train.accumulate=2", "train.max_iter=1"))
    assert (
        "trainable batch normalisation normalises with the images of a micro-batch"
        in (tmp_path / "log.txt").read_text()
    )


TWO_PROCESSES = {
    "even": ["dataloader.train.total_batch_size=8", "train.accumulate=2"],
    "uneven shares": ["dataloader.train.total_batch_size=7", "train.accumulate=2"],
    "more micro-batches than images": ["dataloader.train.total_batch_size=7", "train.accumulate=9"],
    "micro-batches averaged apart": [
        "dataloader.train.total_batch_size=7", "train.accumulate=9", "train.oom=skip",
    ],
}  # fmt: skip


def step_with_unequal_numbers_of_micro_batches() -> None:
    """One process has three images and three micro-batches, the other one image."""
    from torch.nn.parallel import DistributedDataParallel

    from dn_detr.distributed import all_gather, rank

    torch.manual_seed(0)
    model = DistributedDataParallel(instantiate(small_detector(DENSE)).train())
    step = TrainingStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        device=torch.device("cpu"),
        amp=AmpSettings(),
        clip_grad=ClipGradSettings(None),
        accumulate=3,
    )
    data = DrawnScenes()
    for number in (1, 2):
        step([data[index] for index in ((3, 1, 4) if rank() == 0 else (2,))], number)
    first, second = all_gather([value.sum().item() for value in model.parameters()])
    assert first == second


def run_on_two_processes(folder: str) -> None:
    for name, overrides in TWO_PROCESSES.items():
        train(small_run(Path(folder, name), *overrides, *PLAIN, "train.max_iter=3", name=DENSE))
    step_with_unequal_numbers_of_micro_batches()


@pytest.mark.slow
def test_micro_batches_on_two_processes_are_the_batch_on_one(tmp_path):
    launch(run_on_two_processes, 2, str(tmp_path), device="cpu")
    for name, overrides in TWO_PROCESSES.items():
        alone = small_run(tmp_path, overrides[0], *PLAIN, name=DENSE)
        assert_weights(tmp_path / name, train_by_hand(alone, [1, 2, 3])[0], rounding=2e-6)
    log = (tmp_path / "uneven shares/log.txt").read_text()
    assert "each step: 7 images = 2 rank(s) x 2 micro-batch(es) of 1 to 2" in log
