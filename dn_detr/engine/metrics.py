"""Numbers of a run: running sums on each rank between two log records, merged over ranks."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dn_detr.distributed import all_gather

if TYPE_CHECKING:
    from .step import StepResult

Record = dict[str, float | int | None]

# Columns of every log record. Skipping a step is a decision of all ranks together, which the main
# process counts; an image is skipped by the rank whose loader reads it.
EVENTS = ("nonfinite_steps", "overflow_steps", "oom_steps", "skipped_images")


@dataclass(frozen=True)
class Mean:
    """A mean of which every rank has a share; totals and counts add up."""

    total: float
    count: float


@dataclass(frozen=True)
class Sum:
    """A number whose values on all ranks add up."""

    value: float | int


@dataclass(frozen=True)
class Maximum:
    """A number of which the largest over all ranks counts."""

    value: float | int


RankRecord = Mapping[str, Mean | Sum | Maximum]


class RunningSums:
    """Sums of one rank since the last log record.

    A total may stay a tensor on the device: nothing is copied from there before `averages`, so
    adding costs a training no waiting. A checkpoint stores the sums, so the next record of a
    resumed run is the uninterrupted run's to the bit; but no times: rates are those of the
    iterations that this process made.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor | float, Tensor | float]] = {}
        self._events = dict.fromkeys(EVENTS, 0)
        self._iterations = self._images = 0
        self._data_seconds = self._seconds = 0.0

    def add(
        self, name: str | tuple[str, ...], total: Tensor | float, count: Tensor | float = 1
    ) -> None:
        """Add to a mean; it is left out of a record whose counts are all 0.

        Args:
            name: of the mean, or the names of several.
            total: what to average: a number or a () tensor; (n,) of n names.
            count: of how many things `total` is the sum, a number or a () tensor.
        """
        names = (name,) if isinstance(name, str) else name
        old_total, old_count = self._sums.get(names, (0.0, 0.0))
        self._sums[names] = (old_total + _exact(total), old_count + _exact(count))

    def count(self, event: str, number: int = 1) -> None:
        """Count an event of this rank; the counts of all ranks add up."""
        self._events[event] = self._events.get(event, 0) + number

    def add_step(self, result: StepResult) -> None:
        """Add the losses of a step and its gradient norm, unless that overflowed in float16."""
        self.add("loss", result.losses.sum())
        self.add(tuple(f"loss/{name}" for name in result.names), result.losses)
        is_finite = result.grad_norm.isfinite()
        self.add("grad_norm", torch.where(is_finite, result.grad_norm, 0.0), is_finite)

    def add_times(self, *, images: int, data_seconds: float, seconds: float) -> None:
        """Add an iteration.

        Args:
            images: that this rank computed on.
            data_seconds: that it waited for them.
            seconds: of the whole iteration.
        """
        self._iterations += 1
        self._images += images
        self._data_seconds += data_seconds
        self._seconds += seconds

    def averages(self) -> RankRecord:
        """Return this rank's share of the record."""
        means: dict[str, Mean] = {}
        for names, (totals, count) in self._sums.items():
            values = totals.reshape(-1).tolist() if isinstance(totals, Tensor) else [totals]
            means |= {k: Mean(v, float(count)) for k, v in zip(names, values, strict=True)}
        return {
            **means,
            "data_time": Mean(self._data_seconds, self._iterations),
            "iter_time": Mean(self._seconds, self._iterations),
            "images_per_s": Sum(self._images / max(self._seconds, 1e-9)),
            **{event: Sum(number) for event, number in self._events.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums in types that a checkpoint stores; equal for equal runs."""
        sums = [(list(names), *map(_on_cpu, values)) for names, values in self._sums.items()]
        return {"sums": sums, "events": dict(self._events)}

    def add_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Add the sums of a `state_dict`, of which the tensors belong on `device`."""
        for names, *values in state["sums"]:
            total, count = (v.to(device) if isinstance(v, Tensor) else v for v in values)
            self.add(tuple(names), total, count)
        for event, number in state["events"].items():
            self.count(event, number)


def merge_over_ranks(record: RankRecord) -> Record:
    """Merge the records of all ranks into one; a collective call."""
    return merge_records(all_gather(dict(record)))


def merge_records(records: Sequence[RankRecord]) -> Record:
    """Merge the records of several ranks; a mean of nothing is left out."""
    merged: Record = {}
    for name in dict.fromkeys(name for record in records for name in record):
        shares = [record[name] for record in records if name in record]
        means = [share for share in shares if isinstance(share, Mean)]
        values = [share.value for share in shares if not isinstance(share, Mean)]
        if not means:
            merged[name] = sum(values) if isinstance(shares[0], Sum) else max(values)
        elif count := math.fsum(mean.count for mean in means):
            merged[name] = math.fsum(mean.total for mean in means) / count
    return merged


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: the GPU's if it uses one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def evaluation_record(results: Mapping[str, Any], prefix: str = "eval") -> Record:
    """Flatten an evaluator's results: {"AP": x, "per_class": {"cat": y}} ->
    {"eval/AP": x, "eval/per_class/cat": y}."""
    record: Record = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            record |= evaluation_record(value, f"{prefix}/{name}")
        else:
            record[f"{prefix}/{name}"] = value
    return record


def _exact(value: Tensor | float) -> Tensor | float:
    return value.detach().double() if isinstance(value, Tensor) else value


def _on_cpu(value: Tensor | float) -> Tensor | float:
    return value.cpu() if isinstance(value, Tensor) else value
