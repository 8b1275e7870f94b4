"""Numbers of a run: running sums on each rank between two log records, merged over ranks."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .step import Outcome, StepResult

Record = dict[str, float | int | None]

# Columns of every log record. Skipping a step is a decision of all ranks together, which the main
# process counts; an image is skipped by the rank whose loader reads it.
EVENTS = ("nonfinite_steps", "overflow_steps", "oom_steps", "skipped_images")


class RankRecord(NamedTuple):
    """What one rank knows of a log record.

    Attributes:
        means: name -> total and count, which add up over ranks.
        sums: name -> number, which adds up over ranks.
        memory_mib: peak memory; the largest over ranks counts.
    """

    means: Mapping[str, tuple[float, float]]
    sums: Mapping[str, float]
    memory_mib: float


class RunningSums:
    """Sums of one rank since the last log record.

    A total may stay a tensor on a GPU: nothing is copied from there before a record is made, so
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
        if result.outcome is not Outcome.OVERFLOW:
            self.add("grad_norm", result.grad_norm)

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

    def of_this_rank(self, device: torch.device) -> RankRecord:
        """Return this rank's share of the record; `device` is where it computes."""
        means: dict[str, tuple[float, float]] = {}
        for names, (totals, count) in self._sums.items():
            values = totals.reshape(-1).tolist() if isinstance(totals, Tensor) else [totals]
            means |= {name: (v, float(count)) for name, v in zip(names, values, strict=True)}
        means["data_time"] = (self._data_seconds, self._iterations)
        means["iter_time"] = (self._seconds, self._iterations)
        sums = {"images_per_s": self._images / max(self._seconds, 1e-9), **self._events}
        return RankRecord(means, sums, peak_memory_mib(device))

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


def merge_records(records: Sequence[RankRecord]) -> Record:
    """Merge the records of several ranks into one; a mean of nothing is left out."""
    merged: Record = {}
    for name in dict.fromkeys(name for record in records for name in record.means):
        shares = [record.means[name] for record in records if name in record.means]
        if count := math.fsum(count for _, count in shares):
            merged[name] = math.fsum(total for total, _ in shares) / count
    for name in dict.fromkeys(name for record in records for name in record.sums):
        merged[name] = sum(record.sums.get(name, 0) for record in records)
    merged["memory_mib"] = max(record.memory_mib for record in records)
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
    """A number to add up in double precision: a GPU's stays there, fetching it would wait."""
    if not isinstance(value, Tensor):
        return value
    is_at_hand = value.ndim == 0 and value.device.type == "cpu"
    return value.item() if is_at_hand else value.detach().double()


def _on_cpu(value: Tensor | float) -> Tensor | float:
    return value.cpu() if isinstance(value, Tensor) else value
