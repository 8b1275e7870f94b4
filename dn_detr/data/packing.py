"""Batches on their way from a worker to the main process.

torch opens a file in shared memory for every tensor that a worker sends, in a thread whose errors
leave the main process waiting for ever. A packed batch has one, which the worker makes itself.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from .errors import DatasetError

REMEDY = (
    "Enlarge /dev/shm (docker run --shm-size=8g), raise the number of open files (ulimit -n),"
    " lower num_workers or the batch size, or load in the main process with num_workers=0"
)

_ALIGNMENT = 16  # bytes, of the largest numbers


class _Pickler(pickle.Pickler):
    """Leaves out plain tensors and keeps their numbers as pieces of one tensor."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.pieces = [torch.empty(0, dtype=torch.uint8)]
        self.position = 0

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or value.requires_grad or value.is_complex():
            return None
        numbers = value.contiguous().flatten().view(torch.uint8)
        start, end = self.position, self.position + len(numbers)
        self.position = end + -end % _ALIGNMENT
        self.pieces += [numbers, numbers.new_zeros(self.position - end)]
        return start, end, value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, numbers: Tensor) -> None:
        super().__init__(io.BytesIO(content))
        self.numbers = numbers

    def persistent_load(self, pid: Any) -> Tensor:
        start, end, dtype, shape = pid
        return self.numbers[start:end].view(dtype).view(shape)


def pack(samples: list[Any]) -> tuple[bytes, Tensor]:
    """Pack a batch: its tensors lie in one tensor in shared memory.

    Raises:
        DatasetError: there is no room for it, or no file may be opened.
    """
    content = io.BytesIO()
    pickler = _Pickler(content)
    pickler.dump(samples)
    numbers = torch.cat(pickler.pieces)
    try:
        return content.getvalue(), numbers.share_memory_()
    except (OSError, RuntimeError) as error:
        raise DatasetError(
            f"a batch of {len(numbers) / 2**20:.0f} MiB finds no shared memory on its way from a"
            f" worker process ({error}). {REMEDY}"
        ) from error


def unpack(packed: tuple[bytes, Tensor]) -> list[Any]:
    """The batch of `pack`; its tensors are views of one."""
    samples: list[Any] = _Unpickler(*packed).load()
    return samples
