"""Numbers of a run: collected on each process between two rows, and merged over processes."""

from __future__ import annotations

import math
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dn_detr.distributed import all_gather

if TYPE_CHECKING:
    from .step import StepResult

Row = dict[str, float | int | None]

# Events that an interval counts. Skipping a step is a decision of all processes together, so every
# process counts the same steps; an image is skipped by the process whose loader reads it.
STEP_EVENTS = ("nonfinite_steps", "overflow_steps", "oom_steps")
IMAGE_EVENTS = ("skipped_images",)
EVENTS = (*STEP_EVENTS, *IMAGE_EVENTS)

_DENOISING_TERM = re.compile(r"_dn(_\d+)?$")  # loss_ce_dn, loss_ce_dn_0
_MERGED_BY_MAXIMUM = frozenset({*STEP_EVENTS, "memory_mib"})
_MERGED_BY_SUM = frozenset({*IMAGE_EVENTS, "images_per_s"})


class Ratio(NamedTuple):
    """A quotient of which every process knows a share: numerators and denominators add up."""

    numerator: float
    denominator: float


LocalRow = Mapping[str, float | int | Ratio | None]


@dataclass
class Interval:
    """Losses, events and times since the last row.

    Nothing is copied from the device before `averages`. A checkpoint stores what the weights
    depend on, so that the next row is the uninterrupted run's to the bit, but no time: rates are
    those of the iterations that this process made.
    """

    losses: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)
    denoising_correct: list[Tensor] = field(default_factory=list)
    denoising_total: int = 0
    events: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVENTS, 0))
    iterations: int = 0
    images: int = 0
    data_seconds: float = 0.0
    seconds: float = 0.0

    def record(
        self, result: StepResult | None, *, images: int, data_seconds: float, seconds: float
    ) -> None:
        """Add one iteration.

        Args:
            result: of its step; None if the step was skipped and its numbers are not to be
                averaged.
            images: that this process computed on.
            data_seconds: that it waited for them.
            seconds: of the whole iteration.
        """
        if result is not None:
            self.losses.append((result.names, result.losses))
            self.grad_norms.append(result.grad_norm)
        self.iterations += 1
        self.images += images
        self.data_seconds += data_seconds
        self.seconds += seconds

    def record_denoising(self, correct: Tensor, total: int) -> None:
        """Add noised boxes.

        Args:
            correct: (), how many got their true class back; may lie on any device.
            total: how many there were.
        """
        self.denoising_correct.append(correct)
        self.denoising_total += total

    def count(self, event: str, number: int = 1) -> None:
        """Count an event, one of `EVENTS`."""
        self.events[event] += number

    def averages(self) -> LocalRow:
        """Return means over the iterations of the interval on this process.

        `loss` and `grad_norm` are None if every step was skipped. `grad_norm` leaves out steps
        whose gradient overflowed in float16; `overflow_steps` counts those.
        """
        return {
            **self._mean_losses(),
            "grad_norm": _mean_of_finite(self.grad_norms),
            **self._rates(),
            **self.events,
            **self._denoising_accuracy(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the content in types that a checkpoint stores; equal for equal runs."""
        return {
            "losses": [(list(names), values.cpu()) for names, values in self.losses],
            "grad_norms": [value.cpu() for value in self.grad_norms],
            "denoising_correct": [value.cpu() for value in self.denoising_correct],
            "denoising_total": self.denoising_total,
            "events": dict(self.events),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Interval:
        """Rebuild an interval that a checkpoint stored."""
        return cls(
            losses=[(tuple(names), values.to(device)) for names, values in state["losses"]],
            grad_norms=[value.to(device) for value in state["grad_norms"]],
            denoising_correct=[value.to(device) for value in state["denoising_correct"]],
            denoising_total=state["denoising_total"],
            events=dict(state["events"]),
        )

    def _mean_losses(self) -> Row:
        if not self.losses:
            return {"loss": None}
        totals = torch.stack([values.sum() for _, values in self.losses])
        means = _mean_terms(self.losses)
        return {
            "loss": totals.double().mean().item(),
            **_sums_of_matching_and_denoising(self.losses, means),
            **{f"loss/{name}": mean for name, mean in means.items()},
        }

    def _rates(self) -> Row:
        iterations = max(self.iterations, 1)
        return {
            "data_time": self.data_seconds / iterations,
            "iter_time": self.seconds / iterations,
            "images_per_s": self.images / max(self.seconds, 1e-9),
        }

    def _denoising_accuracy(self) -> dict[str, Ratio]:
        if not self.denoising_correct:
            return {}
        correct = torch.stack(self.denoising_correct).double().sum().item()
        return {"denoising_accuracy": Ratio(correct, self.denoising_total)}


def average_over_ranks(row: LocalRow) -> Row:
    """Merge the rows of all processes into one; a collective call.

    Returns:
        The mean of every entry over the processes that have a number there; images add up,
        steps and memory are the largest; a `Ratio` becomes a number, or is left out if there was
        nothing to count.
    """
    return merge_rows(all_gather(dict(row)))


def merge_rows(rows: Sequence[LocalRow]) -> Row:
    """Merge the rows of several processes, see `average_over_ranks`."""
    merged: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        column = [value for row in rows if (value := row.get(name)) is not None]
        ratios = [value for value in column if isinstance(value, Ratio)]
        numbers = [value for value in column if not isinstance(value, Ratio)]
        if not ratios:
            merged[name] = _reduction(name)(numbers) if numbers else None
        elif denominator := math.fsum(ratio.denominator for ratio in ratios):
            merged[name] = math.fsum(ratio.numerator for ratio in ratios) / denominator
    return merged


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: the GPU's if it uses one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def evaluation_row(results: Mapping[str, Any], prefix: str = "eval") -> Row:
    """Flatten an evaluator's results: {"AP": x, "per_class": {"cat": y}} ->
    {"eval/AP": x, "eval/per_class/cat": y}."""
    row: Row = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            row |= evaluation_row(value, f"{prefix}/{name}")
        else:
            row[f"{prefix}/{name}"] = value
    return row


def _reduction(name: str) -> Callable[[Sequence[float | int]], float | int]:
    if name in _MERGED_BY_MAXIMUM:
        return max
    if name in _MERGED_BY_SUM:
        return sum
    return lambda column: math.fsum(column) / len(column)


def _mean_of_finite(values: Sequence[Tensor]) -> float | None:
    if not values:
        return None
    stacked = torch.stack(list(values)).double()
    return stacked[stacked.isfinite()].mean().item()  # nan, stored as null, if there is none


def _mean_terms(losses: Iterable[tuple[tuple[str, ...], Tensor]]) -> dict[str, float]:
    """Average each term over the iterations in which it appeared."""
    columns: dict[str, list[Tensor]] = {}
    for names, values in losses:
        for name, value in zip(names, values.unbind(), strict=True):
            columns.setdefault(name, []).append(value)
    means = torch.stack([torch.stack(column).double().mean() for column in columns.values()])
    return dict(zip(columns, means.tolist(), strict=True))


def _sums_of_matching_and_denoising(
    losses: Sequence[tuple[tuple[str, ...], Tensor]], means: Mapping[str, float]
) -> Row:
    """Average the sums of both kinds of terms; an empty row if there is only one kind."""
    counts = Counter(name for names, _ in losses for name in names)
    kinds: dict[bool, list[float]] = {False: [], True: []}
    for name, mean in means.items():
        is_denoising = _DENOISING_TERM.search(name) is not None
        kinds[is_denoising].append(mean * counts[name])
    if not all(kinds.values()):
        return {}
    matching, denoising = (math.fsum(sums) / len(losses) for sums in kinds.values())
    return {"loss_matching": matching, "loss_denoising": denoising}
