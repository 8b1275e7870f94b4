"""Telling numbers from NaN and infinity, cheaply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the floating-point tensors that hold NaN or infinity.

    Each tensor is read once and no device is waited for more than once.

    Args:
        tensors: name -> tensor of any shape, type and device.
    """
    by_device: dict[torch.device, list[str]] = defaultdict(list)
    for name, value in tensors.items():
        if value.is_floating_point():
            by_device[value.device].append(name)
    suspects: list[str] = []
    for names in by_device.values():
        is_finite = torch.stack([_sum(tensors[name]) for name in names]).isfinite().tolist()
        suspects += [name for name, finite in zip(names, is_finite, strict=True) if not finite]
    # The sum of finite numbers may overflow, so only a non-finite sum needs the long way.
    return [name for name in suspects if not bool(tensors[name].isfinite().all())]


def _sum(value: Tensor) -> Tensor:
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.detach().sum(dtype=dtype).double()
