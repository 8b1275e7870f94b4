"""Numbers of a run: collected per interval, written to metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .distributed import all_gather

METRICS_FILE = "metrics.jsonl"
Row = dict[str, float | int | None]


@dataclass
class Interval:
    """Losses and times since the last row; nothing is copied from the device until `averages`."""

    losses: list[tuple[tuple[str, ...], Tensor]] = field(default_factory=list)
    grad_norms: list[Tensor] = field(default_factory=list)
    data_seconds: float = 0.0
    seconds: float = 0.0
    images: int = 0

    def averages(self) -> Row:
        """Return means over the iterations of the interval on this process."""
        terms = _mean_terms(self.losses)
        totals = torch.stack([values.sum() for _, values in self.losses])
        row: Row = {"loss": totals.double().mean().item()}
        row |= {f"loss/{name}": value for name, value in terms.items()}
        row["grad_norm"] = torch.stack(self.grad_norms).double().mean().item()
        row["data_time"] = self.data_seconds / len(self.losses)
        row["iter_time"] = self.seconds / len(self.losses)
        row["images_per_s"] = self.images / max(self.seconds, 1e-9)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the content in types that a checkpoint stores."""
        losses = [(list(names), values.cpu()) for names, values in self.losses]
        return {**vars(self), "losses": losses, "grad_norms": [x.cpu() for x in self.grad_norms]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Interval:
        """Rebuild an interval that a checkpoint stored."""
        losses = [(tuple(names), values.to(device)) for names, values in state["losses"]]
        grad_norms = [value.to(device) for value in state["grad_norms"]]
        return cls(**{**state, "losses": losses, "grad_norms": grad_norms})


def average_over_ranks(row: Row) -> Row:
    """Return the mean of every entry over all processes; images per second add up."""
    rows = all_gather(row)
    names = dict.fromkeys(name for each in rows for name in each)
    values = {name: [each[name] for each in rows if name in each] for name in names}
    means: Row = {name: math.fsum(column) / len(column) for name, column in values.items()}
    means["images_per_s"] = math.fsum(values["images_per_s"])
    return means


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


class MetricsWriter:
    """Writes rows to `metrics.jsonl` and TensorBoard; later rows of an abandoned run are removed.

    Args:
        folder: output folder of the run.
        iteration: the run continues after this one; 0 for a new run.
        is_evaluated: whether the row of the evaluation at `iteration` is kept.
    """

    def __init__(self, folder: Path, iteration: int, *, is_evaluated: bool = False) -> None:
        path = folder / METRICS_FILE
        _truncate(path, iteration, is_evaluated)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def write(self, row: Row) -> None:
        """Append one row; it needs `iteration`, and what is not finite is stored as null."""
        finite = {name: value if _is_finite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if name != "iteration" and value is not None:
                self._board.add_scalar(name, value, row["iteration"])
        self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._board.close()


def _mean_terms(losses: Sequence[tuple[tuple[str, ...], Tensor]]) -> dict[str, float]:
    """Average each term over the iterations in which it appeared."""
    columns: dict[str, list[Tensor]] = {}
    for names, values in losses:
        for name, value in zip(names, values.unbind(), strict=True):
            columns.setdefault(name, []).append(value)
    means = torch.stack([torch.stack(column).double().mean() for column in columns.values()])
    return dict(zip(columns, means.tolist(), strict=True))


def _is_finite(value: float | int | None) -> bool:
    return value is not None and math.isfinite(value)


def _truncate(path: Path, iteration: int, is_evaluated: bool) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that a killed process was writing
        is_evaluation = any(name.startswith("eval/") for name in row)
        is_pending = is_evaluation and row["iteration"] == iteration and not is_evaluated
        if row["iteration"] <= iteration and iteration > 0 and not is_pending:
            kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
