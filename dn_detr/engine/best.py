"""The best evaluation of a run, and whether results have stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dn_detr.errors import UserError

from .metrics import evaluation_row


class BestResult:
    """Follows one result of the evaluations; larger is better.

    Args:
        metric: its name, "AP" or "ema/AP" or "per_class/cat".
        patience: evaluations without a gain after which the run has stagnated; None: never.
        min_delta: what counts as a gain.
    """

    def __init__(self, metric: str, patience: int | None = None, min_delta: float = 0.0) -> None:
        self._metric = metric
        self._patience = patience
        self._min_delta = min_delta
        self.value = -math.inf
        self._reference = -math.inf  # the value that the patience started from
        self._without_gain = 0

    @property
    def has_stagnated(self) -> bool:
        """Whether the last `patience` evaluations gained nothing."""
        return self._patience is not None and self._without_gain >= self._patience

    def describe(self) -> str:
        """Say what is followed, and what became of it."""
        return (
            f"{self._metric} gained no more than {self._min_delta:g} in the last "
            f"{self._without_gain} evaluations; the best is {self.value:.4g}"
        )

    def update(self, results: Mapping[str, Any]) -> bool:
        """Take an evaluation's results; return whether they are the best so far.

        A result that is undefined (-1 in COCO's metrics) or not finite is never the best.

        Args:
            results: of the evaluator; of each evaluation once.

        Raises:
            ValueError: there is no such result.
        """
        value = self._look_up(results)
        is_best = value > self.value and value >= 0
        if is_best:
            self.value = value
        if value > self._reference + self._min_delta and value >= 0:
            self._reference = value
            self._without_gain = 0
        else:
            self._without_gain += 1
        return is_best

    def is_in(self, results: Mapping[str, Any]) -> bool:
        """Whether an evaluation has the result that is followed."""
        return f"eval/{self._metric}" in evaluation_row(results)

    def forget_unless_kept(self, kept: Mapping[str, Any] | None) -> None:
        """Judge later results by the best that has a checkpoint, if a better one has none.

        Args:
            kept: the results of the checkpoint that is kept as the best; None if there is none.
        """
        if kept is None or not self.is_in(kept):
            self.value = -math.inf
        else:
            self.value = min(self.value, self._look_up(kept))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "metric": self._metric,
            "value": self.value,
            "reference": self._reference,
            "without_gain": self._without_gain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the best of another metric is forgotten."""
        if state["metric"] == self._metric:
            self.value = state["value"]
            self._reference = state["reference"]
            self._without_gain = state["without_gain"]

    def _look_up(self, results: Mapping[str, Any]) -> float:
        row = evaluation_row(results)
        value = row.get(f"eval/{self._metric}")
        if value is None:
            names = ", ".join(name.removeprefix("eval/") for name in row)
            raise UserError(
                f"train.checkpoint.best={self._metric}: the evaluation has no such result; it has "
                f"{names}"
            )
        return value if math.isfinite(value) else -math.inf
