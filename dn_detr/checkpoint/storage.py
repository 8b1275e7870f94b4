"""Checkpoints on disk: found, verified, loaded; weights alone are also written here."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folders import (
    BEST_LINK,
    CHECKPOINTS_DIR,
    EMA_FILE,
    LAST_LINK,
    MODEL_FILE,
    OPTIMIZER_FILE,
    TRAINING_STATE_FILE,
    is_checkpoint,
    iteration_of,
    move_into_place,
    partial_of,
    saved,
)
from .manifest import MANIFEST_NAME, CheckpointError, Manifest, UnreadableError
from .state_tree import put_tensors
from .tensor_files import read_tensors, write_tensors

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_logger = logging.getLogger(__name__)


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
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    # clone: safetensors refuses tensors that share memory, which aliases of a module do
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model_state.items()
    }
    files = {MODEL_FILE: write_tensors(partial / MODEL_FILE, tensors)}
    Manifest(0, 0.0, files, config, list(class_names)).write(partial)
    move_into_place(partial, folder)
    return folder


def record_metrics(checkpoint: Path, metrics: dict[str, Any]) -> None:
    """Add the results of the evaluation at this checkpoint to its manifest."""
    replace(Manifest.read(checkpoint), metrics=metrics).write(checkpoint)


def read_manifest(checkpoint: str | Path) -> Manifest:
    """Read the verified manifest of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or damaged; the message names the good ones beside it.
    """
    with good_ones_named(Path(checkpoint)):
        return Manifest.read(Path(checkpoint))


def load_training_state(checkpoint: str | Path) -> dict[str, Any]:
    """Load everything but the model on the CPU, after verifying the digests.

    Args:
        checkpoint: the folder, written by any number of processes.

    Returns:
        The entries of `Snapshot.training_state`; "optimizer", as `load_state_dict` of the
        optimizer wants it; and "ema": name -> tensor, or None.

    Raises:
        CheckpointError: a file is missing or damaged (the message names the good checkpoints
            beside it), or the checkpoint is one of weights alone.
    """
    folder = Path(checkpoint)
    with good_ones_named(folder):
        manifest = Manifest.read(folder)
        if TRAINING_STATE_FILE not in manifest.files:
            raise CheckpointError(
                f"{folder}: holds weights alone, without the state of a training that could be "
                "resumed; start one from it with train.init_checkpoint"
            )
        path = manifest.verify(folder, TRAINING_STATE_FILE)
        state = torch.load(path, map_location="cpu", weights_only=True)
        ema = _read_if_there(folder, manifest, EMA_FILE)
        # Version 1 has the optimizer's tensors in place, and no marks.
        moments = _read_if_there(folder, manifest, OPTIMIZER_FILE) or {}
        state["optimizer"] = put_tensors(state.get("optimizer", {}), moments)
        return {**state, "ema": ema}


def best_manifest(checkpoints: Path) -> Manifest | None:
    """Return the manifest of the checkpoint that `best` points at; None if it is not there."""
    try:
        return Manifest.read(checkpoints / BEST_LINK)
    except CheckpointError:
        return None


def damage_of(checkpoint: Path) -> str | None:
    """Verify every file of a checkpoint and say what is wrong; None if nothing is.

    Raises:
        UnreadableError: it cannot be verified, though it may be undamaged.
    """
    try:
        manifest = Manifest.read(checkpoint)
        for name in manifest.files:
            manifest.verify(checkpoint, name)
    except UnreadableError:
        raise
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the last undamaged checkpoint of a run, None if it has saved none.

    It is the one that `output_dir/checkpoints/last` points at. If that is damaged, or `last` leads
    nowhere, an error is logged and the newest undamaged one before it is returned.

    Raises:
        CheckpointError: there are checkpoints but all are damaged; or the folder is itself a
            checkpoint.
        UnreadableError: one that is to be used cannot be read, but is not known to be damaged.
    """
    if (Path(output_dir) / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{output_dir}: itself a checkpoint, not the output folder of a run; start from it "
            f"with train.init_checkpoint={output_dir} and another train.output_dir"
        )
    checkpoints = (Path(output_dir) / CHECKPOINTS_DIR).resolve()
    link = checkpoints / LAST_LINK
    present = saved(checkpoints)
    if not present and not link.exists() and not link.is_symlink():
        return None
    pointed = link.resolve()
    damages = [] if pointed.exists() else [f"{link}: {_what_is_wrong_with(link)}"]
    for folder in _by_preference(present, pointed):
        try:
            damage = damage_of(folder)
        except UnreadableError as error:
            raise UnreadableError(
                f"{error}; it may be undamaged, so none before it is used instead: make it "
                f"readable, or move {folder} away to go on without it"
            ) from error
        if damage is None:
            if damages:
                _logger.error(
                    "the last checkpoint cannot be used:\n  %s\n%s is undamaged and is used "
                    "instead; what was trained after it is lost",
                    "\n  ".join(damages),
                    folder,
                )
            return folder
        damages.append(damage)
    raise CheckpointError(
        f"{checkpoints}: none of the checkpoints can be used:\n  "
        + "\n  ".join(damages)
        + f"\nRestore one from a copy, or delete {checkpoints} to start anew."
    )


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder meant by a checkpoint, a link to one or an output folder.

    A checkpoint or a link (`last`, `best`) stands for itself, damaged or not; an output folder
    stands for its `last_checkpoint`.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        return folder.resolve()
    if is_checkpoint(folder) and folder.parent.is_dir():
        with good_ones_named(folder):
            look = f"holds no {MANIFEST_NAME}" if folder.is_dir() else _what_is_wrong_with(folder)
            raise CheckpointError(f"{folder}: no checkpoint: it {look}")
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


@contextmanager
def good_ones_named(checkpoint: Path) -> Iterator[None]:
    """Let an error about a checkpoint name the undamaged ones beside it."""
    try:
        yield
    except CheckpointError as error:
        folder = checkpoint.resolve()
        others = [path for path in saved(folder.parent) if path != folder]
        good = [str(path) for path in others if _is_good(path)]
        if not is_checkpoint(checkpoint) or not good:
            raise
        raise CheckpointError(f"{error}; undamaged beside it: {', '.join(good)}") from error


def _is_good(checkpoint: Path) -> bool:
    try:
        return damage_of(checkpoint) is None
    except UnreadableError:
        return False


def _read_if_there(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor] | None:
    if not manifest.parts(name):
        return None
    # clone: training writes into these, and they should not depend on a file that may vanish
    return {key: value.clone() for key, value in read_tensors(folder, manifest, name).items()}


def _by_preference(present: Sequence[Path], pointed: Path) -> list[Path]:
    """`last`, then earlier ones, the newest first; then those after `last`, nearest first."""
    if pointed.exists() and pointed not in present:  # a copy that followed the link
        return [pointed, *reversed(present)]
    if not pointed.name.isdigit():
        return list(reversed(present))
    limit = int(pointed.name)
    earlier = [path for path in present if iteration_of(path) <= limit]
    return [*reversed(earlier), *(path for path in present if iteration_of(path) > limit)]


def _what_is_wrong_with(link: Path) -> str:
    if link.is_symlink():
        return f"points at {link.readlink()}, which is not there"
    return "is missing"


def _hub_hint(path: str) -> str:
    if not _HUB_ID.fullmatch(path) or Path(path).suffix:
        return ""
    return (
        f"; if this is an id of Hugging Face, download it first: hf download {path} "
        "--local-dir FOLDER"
    )
