"""Files of named tensors (safetensors) and of training states, and a check for NaN."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .manifest import CheckpointError, Manifest, file_digest, flush_to_disk

_MOST_HEADER = 2**22  # bytes; a thousand tensors have 2**17


@dataclass(frozen=True)
class FileContent:
    """Weights of a file or a checkpoint, as they are.

    Attributes:
        tensors: the file's name -> tensor (CPU); those of large files stay on the disk until used.
        class_names: per row of the class head, None for a row without a class; empty if unknown.
        notes: what else the file holds, one sentence each.
    """

    tensors: dict[str, Tensor]
    class_names: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file that survives a power cut; other threads run meanwhile.

    Args:
        path: the file.
        tensors: name -> contiguous CPU tensor, no two of which share memory.

    Returns:
        The SHA-256 of the file in hexadecimal.
    """
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; safetensors would keep others out
    safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
    flush_to_disk(path)
    return file_digest(path)


def write_state(path: Path, state: Mapping[str, Any]) -> str:
    """Write nested tensors, numbers and strings so that `torch.load(weights_only=True)` reads them.

    Returns:
        The SHA-256 of the file in hexadecimal.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # torch reports an inconsistency of the archive that an error of the disk has caused
        raise error.__context__ or error from None
    flush_to_disk(path)
    return file_digest(path)


def read_tensors(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """Read a safetensors file of a checkpoint after verifying its digest.

    Args:
        folder: the checkpoint folder.
        manifest: of the folder.
        name: of the file, "model.safetensors" or the like.

    Returns:
        name -> tensor (CPU); large ones stay on the disk until used.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = manifest.verify(folder, name)
    try:
        return load_safetensors(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file.

    Raises:
        ValueError: it is damaged, or not one.
    """
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _MOST_HEADER:
                raise ValueError("its header would be huge")
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, LookupError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if any(value.is_floating_point() and value.itemsize == 1 for value in tensors.values()):
        raise ValueError("it has floating-point numbers of 8 bits, which PyTorch cannot compare")
    return tensors


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the floating-point tensors that hold NaN or infinity.

    Each tensor is read once and no device is waited for more than once.

    Args:
        tensors: name -> tensor of any shape, dtype and device.
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
