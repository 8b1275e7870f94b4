"""The state of a training at one moment, and its copy in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .finite import non_finite
from .folders import EMA_FILE, MODEL_FILE, OPTIMIZER_FILE
from .manifest import CheckpointError
from .state_tree import take_tensors, to_bytes
from .tensor_files import share

_LISTED = 5


class NonFiniteWeightsError(CheckpointError):
    """What should be saved holds NaN or infinity."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a training.

    Attributes:
        iteration: optimizer steps done, >= 0.
        epoch: the same in epochs, fractional.
        model: name -> tensor, any device; aliases of one tensor are stored separately.
        optimizer: `state_dict()` of a torch optimizer; empty if there is none.
        training_state: what else a resumed run needs, small: tensors, numbers, strings, None, and
            lists, tuples and dicts of them; no entry "optimizer" or "ema".
        ema: averaged weights under the names of `model`.
    """

    iteration: int
    epoch: float
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    training_state: Mapping[str, Any] = field(default_factory=dict)
    ema: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class HostCopy:
    """What one process writes of a snapshot; later changes of the training do not reach it.

    Attributes:
        iteration: see `Snapshot`.
        epoch: see `Snapshot`.
        files: name of the whole file -> this process's share of its tensors, on the CPU.
        training_state: content of the file of that name.
    """

    iteration: int
    epoch: float
    files: Mapping[str, Mapping[str, Tensor]]
    training_state: bytes


class HostMemory:
    """Copies snapshots into host memory, which is used again for the next one.

    Fresh memory costs several times what copying into it costs.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, snapshot: Snapshot, rank: int = 0, count: int = 1) -> HostCopy:
        """Copy a process's share of a snapshot; the copy before this one loses its content.

        Args:
            snapshot: the same on all processes.
            rank: of the process, in [0, count).
            count: number of processes that write.

        Raises:
            NonFiniteWeightsError: a weight or a number of the optimizer is NaN or infinite.
            CheckpointError: the training state holds what cannot be stored.
        """
        rest, moments = take_tensors(snapshot.optimizer)
        whole: dict[str, Mapping[str, Tensor]] = {MODEL_FILE: snapshot.model}
        if snapshot.ema is not None:
            whole[EMA_FILE] = snapshot.ema
        if moments:
            whole[OPTIMIZER_FILE] = moments
        _check_finite(whole)
        training_state = to_bytes({**snapshot.training_state, "optimizer": rest})
        files = {
            file: {
                name: self._copy((file, name), value)
                for name, value in share(tensors, rank, count).items()
            }
            for file, tensors in whole.items()
        }
        return HostCopy(snapshot.iteration, snapshot.epoch, files, training_state)

    def release(self) -> None:
        """Give the memory back; the last copy must be done with."""
        self._buffers.clear()

    def _copy(self, key: tuple[str, str], value: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype)
            self._buffers[key] = buffer
        return buffer.copy_(value.detach())


def _check_finite(files: Mapping[str, Mapping[str, Tensor]]) -> None:
    broken = [
        f"{file.split('.')[0]}: {name}"
        for file, tensors in files.items()
        for name in non_finite(tensors)
    ]
    if broken:
        rest = f" and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
        raise NonFiniteWeightsError(
            f"not saved: {len(broken)} tensors hold NaN or infinity ({', '.join(broken[:_LISTED])}"
            f"{rest}); go on from the checkpoint before, with a lower learning rate"
        )
