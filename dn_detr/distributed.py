"""Ranks, and small collective calls; all work with and without a group of processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")  # what can be pickled


def is_distributed() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process, in [0, world_size)."""
    return dist.get_rank() if is_distributed() else 0


def local_rank() -> int:
    """Return the rank of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, >= 1."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Return whether this is the main process (rank 0), which writes files and logs."""
    return rank() == 0


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective call failed because another rank is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def barrier() -> None:
    """Wait until every rank has come here."""
    if is_distributed():
        dist.barrier()


def all_gather(value: T) -> list[T]:
    """Return the picklable `value` of every rank, in their order, to every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_main(value: T) -> list[T] | None:
    """Return the picklable `value` of every rank to the main process, None to the others."""
    if not is_distributed():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the main process's buffers: statistics of trainable normalisation differ."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def any_process(*flags: bool | Tensor, device: torch.device) -> list[bool]:
    """Return, for each flag, whether it is set on any rank; one collective call.

    Args:
        flags: of this rank; a tensor is () bool, on `device`.
        device: where the group communicates.
    """
    if not is_distributed():
        return [bool(flag) for flag in flags]
    # full, because copying a number to a GPU would wait for what it computes
    mine = [f if isinstance(f, Tensor) else torch.full((), f, device=device) for f in flags]
    raised = torch.stack(mine).float()
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [value > 0 for value in raised.tolist()]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all ranks.

    For steps that DistributedDataParallel must not average as they are computed, because a
    rank may fail in the middle. A parameter without gradient here counts as zero.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad /= world_size()
        dist.all_reduce(parameter.grad)


def broadcast_from_main(value: T) -> T:
    """Return the picklable `value` of the main process to every rank."""
    values: list[Any] = all_gather(value if is_main() else None)
    return values[0]
