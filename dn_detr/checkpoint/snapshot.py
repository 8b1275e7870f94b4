"""The state of a training at one moment, and its copy in host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .manifest import CheckpointError
from .tensor_files import non_finite

_LISTED = 5
_Path = tuple[Any, ...]  # the keys and indices that lead to an entry


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
        training_state: what else a resumed run needs: tensors, numbers, strings, None, and lists,
            tuples and dicts of them, with strings or numbers as keys; no entry "optimizer".
        ema: EMA of the weights, under the names of `model`.
    """

    iteration: int
    epoch: float
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    training_state: Mapping[str, Any] = field(default_factory=dict)
    ema: Mapping[str, Tensor] | None = None


class HostMemory:
    """Copies snapshots into host memory, which is used again for the next one.

    Fresh memory costs several times what copying into it costs.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Path, Tensor] = {}

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """Copy a snapshot; the copy before this one loses its content.

        Raises:
            NonFiniteWeightsError: a weight or a number of the optimizer is NaN or infinite.
            CheckpointError: the training state holds what cannot be stored.
        """
        sources: dict[_Path, Tensor] = {}
        buffers: dict[_Path, Tensor] = {}

        def rebuild(value: Any, path: _Path) -> Any:
            if value is None or isinstance(value, bool):
                return value
            if isinstance(value, Tensor):
                buffer = self._buffers.get(path)
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = torch.empty(value.shape, dtype=value.dtype)
                sources[path], buffers[path] = value.detach(), buffer
                return buffer
            for plain in (str, int, float):  # a subclass of these might not be loaded again
                if isinstance(value, plain):
                    return plain(value)
            if isinstance(value, Mapping):
                if any(isinstance(key, tuple) for key in value):
                    raise CheckpointError(f"{_dotted(path)} has a tuple for a key; take a string")
                return {rebuild(k, path): rebuild(v, (*path, k)) for k, v in value.items()}
            if isinstance(value, list | tuple):
                items = [rebuild(item, (*path, index)) for index, item in enumerate(value)]
                return tuple(items) if isinstance(value, tuple) else items
            raise CheckpointError(
                f"{_dotted(path)} is of type {type(value).__name__}, which could not be loaded "
                "again without running code; save tensors, numbers, strings, lists, tuples and "
                "dicts"
            )

        parts = ("model", "optimizer", "training_state", "ema")
        copied = {part: rebuild(getattr(snapshot, part), (part,)) for part in parts}
        _check_finite({p: value for p, value in sources.items() if p[0] != "training_state"})
        for path, source in sources.items():
            buffers[path].copy_(source)
        self._buffers = buffers
        return replace(snapshot, **copied)

    def release(self) -> None:
        """Free the memory; the last copy must not be used any more."""
        self._buffers.clear()


def _check_finite(tensors: Mapping[_Path, Tensor]) -> None:
    broken = non_finite({_dotted(path): value for path, value in tensors.items()})
    if broken:
        rest = f" and {len(broken) - _LISTED} more" if len(broken) > _LISTED else ""
        raise NonFiniteWeightsError(
            f"not saved: {len(broken)} tensors hold NaN or infinity ({', '.join(broken[:_LISTED])}"
            f"{rest}); go on from the checkpoint before, with a lower learning rate"
        )


def _dotted(path: _Path) -> str:
    return ".".join(map(str, path))
