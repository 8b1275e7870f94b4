"""Running out of memory: recognising it, and saying on what."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dn_detr.errors import UserError, image_name
from dn_detr.protocols import Sample

# What PyTorch's allocators for CPUs say; they raise a plain RuntimeError.
_ALLOCATOR_COMPLAINTS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory")


class OutOfMemory(UserError, MemoryError):
    """A training step did not fit into memory; the message gives the batch and remedies."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory of a GPU or of the machine ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        complaint in str(error) for complaint in _ALLOCATOR_COMPLAINTS
    )


def describe_batch(samples: Sequence[Sample]) -> str:
    """Return what decides how much memory a batch takes: sizes of images, numbers of objects."""
    shapes = [tuple(sample["image"].shape) for sample in samples]
    padded = (len(shapes), *(max(sides) for sides in zip(*shapes, strict=True)))
    lines = [f"a batch of {len(samples)} images, padded to {padded}:"]
    for sample, shape in zip(samples, shapes, strict=True):
        objects = len(sample["instances"].gt_classes) if "instances" in sample else 0
        lines.append(f"  {image_name(sample)}: {shape}, {objects} objects")
    return "\n".join(lines)
