"""Steps made by hand, without the train loop: what a run must have come to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dn_detr.checkpoint import read_weights
from dn_detr.config import instantiate
from dn_detr.data.samplers import EndlessBatchSampler
from dn_detr.engine import Outcome, TrainingStep
from dn_detr.engine.random_state import seed_everything
from dn_detr.engine.settings import TrainSettings

_TIMINGS = {"data_time", "iter_time", "images_per_s", "memory_mib"}
Weights = dict[str, Tensor]


def images_of_batch(number: int, *, length: int = 32, batch_size: int = 4) -> list[int]:
    """`image_id` of the images of a batch, counted from 1, of the first epoch."""
    batch = EndlessBatchSampler(length, batch_size, seed=42).epoch_batches(0)[number - 1]
    return [index + 1 for index in batch]


def train_by_hand(cfg: DictConfig, numbers: Sequence[int]) -> tuple[Weights, Weights]:
    """Make a step with each of the numbered batches (from 1), as one process does.

    Returns:
        The weights, and their average with `train.ema.decay`.
    """
    settings = TrainSettings.from_config(cfg)
    seed_everything(settings.seed)
    loader = instantiate(cfg.dataloader.train)
    model: nn.Module = instantiate(cfg.model)
    optimizer = instantiate(cfg.optimizer, params=instantiate(cfg.optimizer.params, model=model))
    step = TrainingStep(
        model.train(),
        optimizer,
        device=torch.device("cpu"),
        amp=settings.amp,
        clip_grad=settings.clip_grad,
    )
    averages = {name: value.clone() for name, value in model.state_dict().items()}
    batches: Iterator[Any] = itertools.islice(loader, max(numbers))
    for number, batch in enumerate(batches, start=1):
        if number in numbers and step(batch, number).outcome is Outcome.APPLIED:
            for name, value in model.state_dict().items():
                decay = settings.ema.decay
                average = averages[name] * decay + value * (1 - decay)
                averages[name] = average.to(value.dtype)
    return dict(model.state_dict()), averages


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what two equal runs differ in."""
    return {name: value for name, value in row.items() if name not in _TIMINGS}


def assert_weights(folder: Path, expected: Weights, *, rounding: float = 0.0) -> None:
    """The checkpoint or file holds these weights, to the bit or to a relative rounding."""
    found = read_weights(folder)
    for name in found:
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=rounding,
            atol=rounding,
            msg=lambda text, name=name: f"{name}: {text}",
        )
