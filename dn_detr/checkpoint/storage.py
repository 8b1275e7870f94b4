"""Checkpoint folders on disk: written aside, renamed into place, found again, pruned.

A run's folder holds

    output_dir/checkpoints/0000020/{model.safetensors, training_state.pt, manifest.json}
    output_dir/checkpoints/last -> 0000020
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .manifest import MANIFEST_NAME, CheckpointError, Manifest, file_digest, flush_to_disk

CHECKPOINTS_DIR = "checkpoints"
LAST_LINK = "last"
MODEL_FILE = "model.safetensors"
TRAINING_STATE_FILE = "training_state.pt"
_PARTIAL_SUFFIX = ".partial"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def save_checkpoint(
    output_dir: str | Path,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    *,
    iteration: int,
    epoch: float,
    config: str = "",
    class_names: Sequence[str] = (),
    keep: int | None = None,
) -> Path:
    """Write one checkpoint, point `checkpoints/last` at it and prune old ones.

    A crash at any moment leaves either the previous or the new checkpoint as `last`, complete.

    Args:
        output_dir: folder of the run.
        model_state: name -> tensor, any device; aliases of one tensor are stored separately.
        training_state: optimizer and the like: tensors, numbers, strings, lists, dicts, tuples.
        iteration: optimizer steps done; names the folder, seven digits.
        epoch: the same in epochs.
        config: the resolved config as YAML text.
        class_names: class names of the training data.
        keep: number of newest checkpoints to keep, >= 1; None keeps all.

    Returns:
        The folder of the checkpoint.
    """
    checkpoints = Path(output_dir) / CHECKPOINTS_DIR
    checkpoints.mkdir(parents=True, exist_ok=True)
    folder = checkpoints / f"{iteration:07d}"
    partial = checkpoints / f".{folder.name}{_PARTIAL_SUFFIX}"
    _remove_leftovers(checkpoints)
    partial.mkdir()
    _write_files(partial, model_state, training_state)
    files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    Manifest(iteration, epoch, files, config, list(class_names)).write(partial)
    _move_into_place(partial, folder)
    _point_last_at(folder)
    _prune(checkpoints, newest=folder, keep=keep)
    return folder


def save_weights(
    folder: str | Path,
    model_state: Mapping[str, Tensor],
    *,
    config: str = "",
    class_names: Sequence[str] = (),
) -> Path:
    """Write weights alone as a checkpoint folder: to evaluate or to start a training from.

    Args:
        folder: the checkpoint folder to write; one that is there is replaced.
        model_state: name -> tensor, any device.
        config: the config of the model as YAML text.
        class_names: index = class, empty if unknown.

    Returns:
        The folder.

    Raises:
        CheckpointError: something else than a checkpoint is in the way.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{folder}: in the way, and not a checkpoint that could be replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}{_PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _write_model(partial, model_state)
    files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    Manifest(0, 0.0, files, config, list(class_names)).write(partial)
    _move_into_place(partial, folder)
    return folder


def record_metrics(checkpoint: Path, metrics: dict[str, Any]) -> None:
    """Add the results of the evaluation at this checkpoint to its manifest."""
    replace(Manifest.read(checkpoint), metrics=metrics).write(checkpoint)


def read_manifest(checkpoint: str | Path) -> Manifest:
    """Read the verified manifest of a checkpoint folder."""
    return Manifest.read(Path(checkpoint))


def load_training_state(checkpoint: str | Path) -> dict[str, Any]:
    """Load the optimizer and the like on the CPU, after verifying the digest.

    Raises:
        CheckpointError: the file is missing or damaged, or the checkpoint is one of weights alone.
    """
    folder = Path(checkpoint)
    manifest = Manifest.read(folder)
    if TRAINING_STATE_FILE not in manifest.files:
        raise CheckpointError(
            f"{folder}: holds weights alone, without the state of a training that could be "
            "resumed; start one from it with train.init_checkpoint"
        )
    path = manifest.verify(folder, TRAINING_STATE_FILE)
    return torch.load(path, map_location="cpu", weights_only=True)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the folder that `output_dir/checkpoints/last` points at, None if there is none.

    Raises:
        CheckpointError: the folder holds checkpoints, but `last` points at none of them; or it is
            itself a checkpoint.
    """
    if (Path(output_dir) / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{output_dir}: itself a checkpoint, not the output folder of a run; start from it "
            f"with train.init_checkpoint={output_dir} and another train.output_dir"
        )
    checkpoints = Path(output_dir) / CHECKPOINTS_DIR
    link = checkpoints / LAST_LINK
    if (link / MANIFEST_NAME).is_file():
        return link.resolve()
    if present := _saved(checkpoints):
        raise CheckpointError(
            f"{link}: points at no checkpoint; to repair it: ln -sfn {present[-1].name} {link}"
        )
    return None


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder meant by a checkpoint, a `last` link or an output folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        return folder.resolve()
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such file or folder{_hub_hint(str(path))}")
    if folder.name == CHECKPOINTS_DIR:
        folder = folder.parent
    found = last_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{path}: neither a checkpoint folder (with {MANIFEST_NAME}) nor the output folder of "
            f"a run (with {CHECKPOINTS_DIR}/{LAST_LINK})"
        )
    return found


def _hub_hint(path: str) -> str:
    if not _HUB_ID.fullmatch(path) or Path(path).suffix:
        return ""
    return (
        f"; if this is an id of Hugging Face, download it first: hf download {path} "
        "--local-dir FOLDER"
    )


def _write_files(
    folder: Path, model_state: Mapping[str, Tensor], training_state: Mapping[str, Any]
) -> None:
    _write_model(folder, model_state)
    torch.save(dict(training_state), folder / TRAINING_STATE_FILE)
    flush_to_disk(folder / TRAINING_STATE_FILE)


def _write_model(folder: Path, model_state: Mapping[str, Tensor]) -> None:
    # clone: safetensors refuses tensors that share memory, which aliases of a module do
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in model_state.items()
    }
    safetensors.torch.save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})
    flush_to_disk(folder / MODEL_FILE)


def _move_into_place(partial: Path, folder: Path) -> None:
    """Rename, replacing what an interrupted run may have left under the same iteration."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old{_PARTIAL_SUFFIX}")
        os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old)
    else:
        os.rename(partial, folder)
    flush_to_disk(folder.parent)


def _point_last_at(folder: Path) -> None:
    link = folder.with_name(f".{LAST_LINK}{_PARTIAL_SUFFIX}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, folder.with_name(LAST_LINK))
    flush_to_disk(folder.parent)


def _saved(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders in the order of their iterations."""
    folders = [path.parent for path in checkpoints.glob(f"*/{MANIFEST_NAME}")]
    numbered = [path for path in folders if path.name.isdigit() and not path.is_symlink()]
    return sorted(numbered, key=lambda path: int(path.name))


def _prune(checkpoints: Path, newest: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest; those after `newest` belong to an abandoned future."""
    iteration = int(newest.name)
    saved = _saved(checkpoints)
    kept = [path for path in saved if int(path.name) <= iteration]
    for path in saved:
        if keep is not None and path not in kept[-keep:]:
            shutil.rmtree(path)


def _remove_leftovers(checkpoints: Path) -> None:
    for path in checkpoints.glob(f".*{_PARTIAL_SUFFIX}"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
