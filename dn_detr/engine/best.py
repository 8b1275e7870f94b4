"""The best evaluation of a run, and whether results have stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dn_detr.errors import UserError

from .metrics import evaluation_record


class BestResult:
    """Follows one result of the evaluations; larger is better.

    Args:
        metric: its name, "AP" or "ema/AP" or "per_class/cat"; None: none is followed.
        patience: evaluations without a gain after which the run has stagnated; None: never.
        min_delta: what counts as a gain.

    Attributes:
        value: the best so far; minus infinity if there is none.
        is_best: whether the latest evaluation is the best so far.
    """

    def __init__(
        self, metric: str | None, patience: int | None = None, min_delta: float = 0.0
    ) -> None:
        self._metric = metric
        self._patience = patience
        self._min_delta = min_delta
        self.value = -math.inf
        self.is_best = False
        self._reference = -math.inf  # the value that the patience started from
        self._without_gain = 0
        self._before = self._state()

    @property
    def has_stagnated(self) -> bool:
        """Whether the last `patience` evaluations gained nothing."""
        return self._patience is not None and self._without_gain >= self._patience

    def describe(self) -> str:
        """Return which result is followed, its best value, and since when it gained nothing."""
        return (
            f"{self._metric} gained no more than {self._min_delta:g} in the last "
            f"{self._without_gain} evaluations; the best is {self.value:.4g}"
        )

    def update(self, results: Mapping[str, Any]) -> None:
        """Take an evaluation's results; of each evaluation once.

        A result that is undefined (-1 in COCO's metrics) or not finite is never the best.

        Args:
            results: of the evaluator.

        Raises:
            ValueError: there is no such result.
        """
        self._before = self._state()
        if self._metric is None:
            return
        value = self._look_up(results)
        self.is_best = value > self.value and value >= 0
        if self.is_best:
            self.value = value
        if value > self._reference + self._min_delta and value >= 0:
            self._reference = value
            self._without_gain = 0
        else:
            self._without_gain += 1

    def is_in(self, results: Mapping[str, Any]) -> bool:
        """Whether an evaluation has the result that is followed."""
        return self._metric is None or f"eval/{self._metric}" in evaluation_record(results)

    def fall_back_to(self, kept: Mapping[str, Any] | None) -> None:
        """Use the best result that still has a checkpoint.

        Args:
            kept: the results of the checkpoint that `best` points at; None if there is none.
        """
        if kept is None or self._metric is None or not self.is_in(kept):
            self.value = -math.inf
        else:
            self.value = min(self.value, self._look_up(kept))

    def state_dict(self, *, before_latest: bool = False) -> dict[str, Any]:
        """Return what a checkpoint keeps.

        Args:
            before_latest: leave out the latest evaluation. It is made after the checkpoint of its
                iteration, and taken again from the manifest or made again when that is resumed; so
                a checkpoint that is written after it holds the same.
        """
        return self._before if before_latest else self._state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the best of another metric is dropped."""
        self.is_best = False
        if state["metric"] == self._metric:
            self.value = float(state["value"])
            self._reference = float(state["reference"])
            self._without_gain = int(state["without_gain"])

    def _state(self) -> dict[str, Any]:
        return {
            "metric": self._metric,
            "value": self.value,
            "reference": self._reference,
            "without_gain": self._without_gain,
        }

    def _look_up(self, results: Mapping[str, Any]) -> float:
        record = evaluation_record(results)
        value = record.get(f"eval/{self._metric}")
        if value is None:
            names = ", ".join(name.removeprefix("eval/") for name in record)
            raise UserError(
                f"train.checkpoint.best={self._metric}: the evaluation has no such result; it has "
                f"{names}"
            )
        return value if math.isfinite(value) else -math.inf
