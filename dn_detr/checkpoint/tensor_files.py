"""Named tensors in safetensors files: one file, or a shard per process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .manifest import MANIFEST_NAME, CheckpointError, Manifest, file_digest, flush_to_disk


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file that survives a power cut; other threads run meanwhile.

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


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file that survives a power cut, and return its SHA-256 in hexadecimal."""
    path.write_bytes(data)
    flush_to_disk(path)
    return file_digest(path)


def read_tensors(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """Read a verified file of a checkpoint, or its shards, however many processes wrote them.

    Args:
        folder: the checkpoint folder.
        manifest: of the folder.
        name: "model.safetensors" or the like; shards are found by it.

    Returns:
        name -> tensor (CPU); large ones stay on the disk until used.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    parts = manifest.parts(name)
    if not parts:
        raise CheckpointError(f"{folder / MANIFEST_NAME}: lists no file {name}")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        path = manifest.verify(folder, part)
        try:
            tensors |= safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    return tensors


def shard_name(name: str, rank: int, count: int) -> str:
    """Return "model-00001-of-00002.safetensors" for the first of two shards.

    Args:
        name: of the file if it were whole, which one shard is.
        rank: of the process that writes the shard, in [0, count).
        count: number of shards.
    """
    stem, suffix = name.split(".", 1)
    return name if count == 1 else f"{stem}-{rank + 1:05d}-of-{count:05d}.{suffix}"


def share(tensors: Mapping[str, Tensor], rank: int, count: int) -> dict[str, Tensor]:
    """Return the tensors that go into one shard: about as many bytes as into any other.

    Args:
        tensors: name -> tensor, the same on all processes.
        rank: of the shard, in [0, count).
        count: number of shards.
    """
    loads = [0] * count
    mine: dict[str, Tensor] = {}
    # The largest first, each into the emptiest shard; equal ones by name, so all agree.
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        shard = loads.index(min(loads))
        loads[shard] += tensors[name].nbytes
        if shard == rank:
            mine[name] = tensors[name]
    return mine
