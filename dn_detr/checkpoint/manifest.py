"""The manifest of a checkpoint: what the folder holds and how to tell that it is undamaged."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch

from dn_detr.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = "dn_detr.checkpoint"
FORMAT_VERSION = 3  # 2: the optimizer's tensors lie in a file of their own; 1: without "processes"
_BUFFER = 1 << 22  # bytes
_MOST_BYTES = 1 << 23  # of a manifest


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, belongs to something else, or cannot be written."""


class UnreadableError(CheckpointError):
    """A checkpoint may be undamaged, but this process cannot read it: nothing may replace it."""


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint folder holds.

    Attributes:
        iteration: optimizer steps done when it was written, >= 0.
        epoch: the same in epochs, fractional.
        files: file name in the folder -> SHA-256 in hexadecimal.
        config: the resolved config as YAML text.
        class_names: class names of the training data; index = contiguous class id.
        metrics: results of the evaluation at this iteration; None if there was none.
        versions: versions of the libraries that wrote it.
        format_version: of the folder's files, in [1, FORMAT_VERSION].
    """

    iteration: int
    epoch: float
    files: Mapping[str, str]
    config: str = ""
    class_names: list[str] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json` in one atomic replacement."""
        content = {"format": FORMAT, **asdict(self)}
        content = json.loads(json.dumps(content))  # as it will be read: keys are strings
        content["sha256"] = _digest_of_content(content)
        replace_file(folder / MANIFEST_NAME, _to_bytes(content))
        flush_to_disk(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and verify `folder/manifest.json`, to the last byte.

        Raises:
            CheckpointError: it is missing or damaged.
            UnreadableError: it is of a newer format, or permission to read it is missing.
        """
        path = folder / MANIFEST_NAME
        try:
            if path.exists() and (not path.is_file() or path.stat().st_size > _MOST_BYTES):
                raise ValueError("no regular file, or a huge one")
            data = path.read_bytes()
            content = json.loads(data)
            # White space and escapes have several spellings that mean the same; ours has one.
            is_as_written = _is_as_written(content, data)
            digest = content.pop("sha256")
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{folder}: no {MANIFEST_NAME}, so not a checkpoint") from None
        except PermissionError:
            raise UnreadableError(f"{path}: no permission to read it") from None
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
            raise CheckpointError(f"{path}: damaged, it cannot be read: {e!r}") from e
        if not is_as_written or digest != _digest_of_content(content):
            raise CheckpointError(f"{path}: damaged, its content does not match its own digest")
        if content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path}: not the manifest of a dn_detr checkpoint")
        version = content.get("format_version")
        if version not in range(1, FORMAT_VERSION + 1) or content.keys() - _KINDS.keys():
            raise UnreadableError(f"{path}: written by a newer dn_detr; update the package")
        wrong = [name for name, is_right in _KINDS.items() if not is_right(content.get(name))]
        if wrong:
            raise CheckpointError(f"{path}: damaged, these have no value that fits: {wrong}")
        return cls(**content)

    def verify(self, folder: Path, name: str) -> Path:
        """Return the path of file `name` after comparing it with its digest.

        Raises:
            CheckpointError: the file is missing from the manifest or the folder, or damaged.
            UnreadableError: permission to read it is missing.
        """
        path = folder / name
        if name not in self.files or Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST_NAME}: lists no file {name} in the folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it")
        try:
            digest = file_digest(path)
        except PermissionError:
            raise UnreadableError(f"{path}: no permission to read it") from None
        if digest != self.files[name]:
            raise CheckpointError(
                f"{path}: damaged, its SHA-256 differs from the manifest's; use another checkpoint"
            )
        return path


def _is_text_by_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "iteration": lambda value: type(value) is int and 0 <= value < 2**63,
    "epoch": lambda value: type(value) in (int, float),
    "files": _is_text_by_text,
    "config": lambda value: isinstance(value, str),
    "class_names": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
    "metrics": lambda value: value is None or isinstance(value, dict),
    "versions": _is_text_by_text,
    "format_version": lambda value: type(value) is int,
}


def library_versions() -> dict[str, str]:
    """Return versions of Python and of the libraries that a checkpoint depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    # Reading and hashing let other threads run; one buffer, because mapping and unmapping memory
    # stops them too.
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file in one atomic replacement, with content that survives a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _is_as_written(content: Mapping[str, Any], data: bytes) -> bool:
    """Whether `data` is what `_to_bytes` makes, which may be much larger, of the content."""
    position = 0
    for chunk in json.JSONEncoder(indent=1).iterencode(content):
        if not data.startswith(chunk.encode(), position):
            return False
        position += len(chunk.encode())
    return position == len(data)


def _to_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _digest_of_content(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
