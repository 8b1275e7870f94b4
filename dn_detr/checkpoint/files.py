"""Weights out of files of any kind: ours, torch's, pickles of numpy arrays, safetensors, folders.

Nothing in a file is executed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from .folders import CHECKPOINTS_DIR, EMA_FILE, MODEL_FILE, TRAINING_STATE_FILE, is_checkpoint
from .manifest import MANIFEST_NAME, CheckpointError, Manifest
from .pickles import Array, read_pickle
from .storage import find_checkpoint, suggest_undamaged
from .tensor_files import FileContent, load_safetensors, read_tensors

_SAFETENSORS = ".safetensors"
_HF_CONFIG = "config.json"
_HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MOST_BYTES = 1_000_000  # of a config.json
_WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")
_EMA = "ema_state"
_MOST_ROWS = 100_000  # classes that are believed of a config
CLASS_NAMES = "class_names"  # beside the weights, in a file that we wrote
_PICKLES = (b"PK\x03\x04", b"\x80")  # zip of torch, pickle protocol 2 and later
_OTHERS = (
    (rb"version https://git-lfs", "a git-lfs pointer instead of the file: run git lfs pull"),
    (rb"\s*<(!doctype html|html|\?xml|head|body)", "a web page: the download failed"),
    (rb"\x1f\x8b", "a gzip archive: unpack it first"),
    (rb"(7z\xbc\xaf|Rar!|BZh)", "an archive: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"PK\x05\x06", "an empty zip archive"),
    (rb"\x89HDF", "an HDF5 file, not one of torch"),
    (rb"\s*[\x20-\x7e\s]{16,}", "a text file, not a checkpoint"),
)


def read_file(path: str | Path, *, ema: bool = False) -> FileContent:
    """Read weights.

    Args:
        path: a checkpoint folder or output folder of ours; `model.safetensors` or
            `ema.safetensors` in such a checkpoint; a folder of transformers; a file of torch
            (`.pth`, `.pt`, `.bin`), of safetensors, or a pickle of numpy arrays.
        ema: take the EMA: of a checkpoint of ours, or `ema_state` of a file of
            detrex.

    Raises:
        CheckpointError: there is none, it is damaged, or it holds no weights; the message says
            what the file looks like.
    """
    try:
        return _read(Path(path), ema=ema)
    except OSError as error:  # no permission, a name that is too long, a disk that fails
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: Path, *, ema: bool) -> FileContent:
    if path.name in (MODEL_FILE, EMA_FILE) and is_checkpoint(path.parent):
        return _read_ours(path.parent, EMA_FILE if ema else path.name)
    if path.name == TRAINING_STATE_FILE and is_checkpoint(path.parent):
        raise CheckpointError(
            f"{path}: the state of a training, no weights; those are in {MODEL_FILE} beside it"
        )
    if path.is_file():
        return _read_single_file(path, ema=ema)
    is_ours = is_checkpoint(path) or (path / CHECKPOINTS_DIR).is_dir()
    if is_ours or not path.is_dir() or path.name == CHECKPOINTS_DIR:
        return _read_ours(path, EMA_FILE if ema else MODEL_FILE)
    if not (path / _HF_CONFIG).is_file():
        raise CheckpointError(
            f"{path}: neither a checkpoint folder (with {MANIFEST_NAME}) nor the output folder of "
            f"a run (with {CHECKPOINTS_DIR}/) nor a folder of transformers (with {_HF_CONFIG})"
        )
    for name in _HF_WEIGHTS:
        if (path / name).is_file():
            return _read_single_file(path / name, ema=ema)
    raise CheckpointError(
        f"{path}: holds {_HF_CONFIG} but no weights ({', '.join(_HF_WEIGHTS)}); nor is it a "
        f"checkpoint folder (with {MANIFEST_NAME}) or the output folder of a run"
    )


def _read_ours(path: Path, file: str) -> FileContent:
    folder = find_checkpoint(path)
    with suggest_undamaged(folder):
        manifest = Manifest.read(folder)
        has_ema = EMA_FILE in manifest.files
        if file == EMA_FILE and not has_ema:
            raise CheckpointError(
                f"{folder}: holds no EMA ({EMA_FILE}); train with "
                "train.ema.enabled=true to have them"
            )
        tensors = read_tensors(folder, manifest, file)
    unused = f"the checkpoint also holds an EMA ({EMA_FILE}), which was not taken"
    notes = (unused,) if has_ema and file != EMA_FILE else ()
    return FileContent(tensors, tuple(manifest.class_names), notes)


def _read_single_file(path: Path, *, ema: bool) -> FileContent:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError(f"{path}: empty")
    names = _class_names_of_config(path.parent / _HF_CONFIG)
    if path.suffix == _SAFETENSORS:
        if ema:
            raise _no_ema(path)
        return FileContent(_read_safetensors(path), names)
    if not start.startswith(_PICKLES):
        look = _known_other(start) or "neither a file of torch nor safetensors nor pickled arrays"
        raise CheckpointError(f"{path}: not a checkpoint: {look} ({path.stat().st_size} bytes)")
    return _unwrap(path, read_pickle(path), ema, names)


def _no_ema(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: holds no EMA ({_EMA!r})")


def _known_other(start: bytes) -> str | None:
    return next(
        (look for mark, look in _OTHERS if re.match(mark, start, re.IGNORECASE | re.DOTALL)), None
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_safetensors(path)
    except ValueError as error:
        with path.open("rb") as file:
            look = _known_other(file.read(512)) or f"{error}; download or copy it again"
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file ({size} bytes): {look}"
        ) from error


def _unwrap(
    path: Path, content: Any, ema: bool, names_beside: tuple[str | None, ...]
) -> FileContent:
    """Find the weights among what training scripts put beside them."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds no dictionary of weights but one object of type "
            f"{type(content).__name__}"
        )
    average = content.get(_EMA)
    if ema:
        if not isinstance(average, dict):
            raise _no_ema(path)
        tensors = _as_tensors(path, average)
        notes = [f"the EMA ({_EMA}) was taken"]
    else:
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]
        tensors = _as_tensors(path, inner[0] if inner else content)
        unused = f"the file also holds an EMA ({_EMA}), which was not taken"
        notes = [unused] if isinstance(average, dict) and average else []
    names = content.get(CLASS_NAMES, ())
    if not _are_names_of(names, tensors):
        notes.append(f"the {CLASS_NAMES} of the file are not one string per row: unused")
        names = ()
    return FileContent(tensors, tuple(names or names_beside), tuple(notes))


def _are_names_of(names: Any, tensors: dict[str, Tensor]) -> bool:
    """Whether there is one name per row of the class head, or none at all."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return False
    heads = [value for name, value in tensors.items() if "class_embed" in name and value.dim()]
    return not names or any(len(value) == len(names) for value in heads)


def _as_tensors(path: Path, weights: dict[Any, Any]) -> dict[str, Tensor]:
    values = {n: v.tensor if isinstance(v, Array) else v for n, v in weights.items()}
    tensors = {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    others = [
        f"{str(name)[:100]} ({type(value).__name__})"
        for name, value in weights.items()
        if name not in tensors
    ]
    if not tensors:
        held = f"its entries are {', '.join(others[:10])}" if others else "it is empty"
        raise CheckpointError(f"{path}: holds no weights; {held}")
    if others:
        raise CheckpointError(
            f"{path}: {len(others)} entries beside the weights are no tensors: "
            f"{', '.join(others[:10])}"
        )
    total, size = sum(value.nbytes for value in tensors.values()), path.stat().st_size
    if total > 4 * size + 2**20:
        raise CheckpointError(f"{path}: its tensors show {total} bytes, though it has {size}")
    return tensors


def _class_names_of_config(path: Path) -> tuple[str | None, ...]:
    """`id2label` of a config of transformers; empty if there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ()
        labels = json.loads(path.read_text(encoding="utf-8"))["id2label"]
        by_row = {int(row): str(name) for row, name in labels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()  # names are a help, the weights decide
    if not all(0 <= row < _MOST_ROWS for row in by_row):
        return ()
    return tuple(by_row.get(row) for row in range(max(by_row, default=-1) + 1))
