"""Epochs to iterations, and learning-rate rules in epochs.

A schedule is a pure function of the iteration, so there is no scheduler state to save or to get
out of step: a resumed run computes what the uninterrupted one would have.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from dn_detr.errors import UserError

# (epoch, total_epochs) -> factor of the learning rate; both fractional, 0 <= epoch < total_epochs.
LearningRateRule = Callable[[float, float], float]


@dataclass(frozen=True)
class Timetable:
    """The length of a run.

    Attributes:
        iterations_per_epoch: from the training loader, >= 1.
        max_iter: iterations of the whole run, >= 1.
    """

    iterations_per_epoch: int
    max_iter: int

    @classmethod
    def plan(cls, iterations_per_epoch: int, epochs: float, max_iter: int | None) -> Timetable:
        """Plan a run of `epochs`, or of exactly `max_iter` iterations where that is given."""
        if max_iter is None:
            max_iter = math.ceil(epochs * iterations_per_epoch)
        return cls(iterations_per_epoch, max_iter)

    @property
    def total_epochs(self) -> float:
        """Length of the run in epochs."""
        return self.epoch(self.max_iter)

    def epoch(self, iteration: int) -> float:
        """Return epochs done after `iteration` iterations, fractional."""
        return iteration / self.iterations_per_epoch

    def is_due(self, period: int | str | None, iteration: int) -> bool:
        """Return whether something periodic happens after `iteration` iterations (1-based).

        It always happens at the end of the run.
        """
        every = parse_period(period, self.iterations_per_epoch)
        return iteration == self.max_iter or (every is not None and iteration % every == 0)


def parse_period(period: int | str | None, iterations_per_epoch: int) -> int | None:
    """Return a period in iterations, >= 1; None for never.

    Args:
        period: iterations if int, epochs if written "1ep" or "0.5ep"; 0 or None: never.
        iterations_per_epoch: >= 1.

    Raises:
        ValueError: anything else.
    """
    if period is None or period == 0:
        return None
    if isinstance(period, int) and period > 0:
        return period
    try:
        epochs = float(str(period).removesuffix("ep"))
    except ValueError:
        epochs = math.nan
    if not (str(period).endswith("ep") and 0 < epochs < math.inf):
        raise UserError(
            f"period {period!r}: expected iterations (500), epochs (1ep, 0.5ep), or 0 for never"
        )
    return max(1, round(epochs * iterations_per_epoch))


def multi_step(
    milestones: Sequence[float],
    gamma: float = 0.1,
    *,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.001,
) -> LearningRateRule:
    """Multiply the learning rate by `gamma` at every milestone; without milestones it is constant.

    Args:
        milestones: epochs, may be fractional.
        gamma: factor at each milestone, > 0.
        warmup_epochs: length of a linear warm-up from `warmup_start` to 1, in epochs.
        warmup_start: factor at iteration 0 of the warm-up, in (0, 1].

    Source: DN-DETR's recipe is milestones=[40] of 50 epochs ([11] of 12), gamma=0.1, no warm-up.
    """
    ordered = sorted(milestones)
    if not gamma > 0:
        raise UserError(f"lr_schedule.gamma={gamma}: expected > 0")

    def rule(epoch: float, total_epochs: float) -> float:
        decay = gamma ** bisect.bisect_right(ordered, epoch)
        return decay * _warmup(epoch, warmup_epochs, warmup_start)

    return rule


def cosine(
    final_factor: float = 0.0, *, warmup_epochs: float = 0.0, warmup_start: float = 0.001
) -> LearningRateRule:
    """Decay along half a cosine from 1 at the start to `final_factor` at the end of the run.

    Args:
        final_factor: factor at the end, in [0, 1].
        warmup_epochs: length of a linear warm-up, in epochs; it multiplies the cosine.
        warmup_start: factor at iteration 0 of the warm-up, in (0, 1].
    """

    def rule(epoch: float, total_epochs: float) -> float:
        half_cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / total_epochs)))
        decay = final_factor + (1 - final_factor) * half_cosine
        return decay * _warmup(epoch, warmup_epochs, warmup_start)

    return rule


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times its `initial_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _warmup(epoch: float, length: float, start: float) -> float:
    return 1.0 if epoch >= length else start + (1 - start) * epoch / length
