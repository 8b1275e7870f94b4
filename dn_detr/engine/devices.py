"""Which device and how many cores a process computes on."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

import torch

from dn_detr.distributed import local_rank, world_size
from dn_detr.errors import UserError

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """Return the device of this process and make it the current one.

    Args:
        name: "auto" (CUDA where there is a GPU), "cpu", "cuda" or, in a single process, "cuda:1".

    Raises:
        UserError: there is no such device.
    """
    device = parse_device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank())
        elif world_size() > 1:
            raise UserError(f"train.device={name}: several processes need train.device=cuda")
        require_gpus(device.index + 1, name)
        torch.cuda.set_device(device)
    return device


def announce_device(device: torch.device, wanted: str) -> None:
    """Log what the run computes on; a CPU that train.device=auto fell back to is a warning.

    Args:
        device: of this process.
        wanted: `train.device`.
    """
    if device.type == "cuda":
        logger.info("running on %s (%s)", device, torch.cuda.get_device_name(device))
    elif wanted == "auto":
        logger.warning("no GPU was found: running on the CPU, as with train.device=cpu")
    else:
        logger.info("running on %s", device)


def parse_device(name: str) -> torch.device:
    """Return the device that `train.device` names; UserError if it names none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            return device
    raise UserError(f"train.device={name!r}: expected auto, cpu, cuda or cuda:0")


def use_cores(count: int) -> None:
    """Let torch compute with so many threads (at least one), unless OMP_NUM_THREADS says."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count))


def require_gpus(count: int, name: str) -> None:
    """Raise UserError if this machine has fewer than `count` GPUs; `name` is `train.device`."""
    present = torch.cuda.device_count()
    if count > present:
        raise UserError(
            f"train.device={name}: {count} GPU(s) needed, this machine has {present}; "
            "train.device=cpu runs without"
        )
