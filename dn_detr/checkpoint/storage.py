"""Checkpoints on disk: found, verified, loaded; weights alone are also written here."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .folders import (
    BEST_LINK,
    CHECKPOINTS_DIR,
    EMA_FILE,
    LAST_LINK,
    MODEL_FILE,
    TRAINING_STATE_FILE,
    is_checkpoint,
    iteration_of,
    move_into_place,
    partial_of,
    saved,
    without_links,
)
from .manifest import FORMAT_VERSION, MANIFEST_NAME, CheckpointError, Manifest, UnreadableError
from .pickles import read_pickle
from .snapshot import Snapshot
from .tensor_files import FileContent, read_tensors, write_tensors

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
logger = logging.getLogger(__name__)

Used = TypeVar("Used")


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
        CheckpointError: it is missing or damaged; the message names the undamaged ones beside it.
    """
    with suggest_undamaged(Path(checkpoint)):
        return Manifest.read(Path(checkpoint))


@dataclass(frozen=True)
class LoadedCheckpoint:
    """All that a checkpoint folder holds, verified and on the CPU.

    Attributes:
        folder: the checkpoint folder.
        manifest: of the folder.
        snapshot: the state of the training.
    """

    folder: Path
    manifest: Manifest
    snapshot: Snapshot

    @property
    def weights(self) -> FileContent:
        """The weights of the model, for `load_tensors`."""
        return FileContent(dict(self.snapshot.model), tuple(self.manifest.class_names))


def load_checkpoint(checkpoint: str | Path) -> LoadedCheckpoint:
    """Load everything that a checkpoint of a training holds; each file is verified and read once.

    Args:
        checkpoint: the checkpoint folder, or a link to it.

    Raises:
        CheckpointError: a file is missing or damaged (the message names the undamaged checkpoints
            beside it), or the checkpoint is one of weights alone or of an older version.
    """
    with suggest_undamaged(Path(checkpoint)):
        return _load(Path(checkpoint))


def load_last_checkpoint(output_dir: str | Path) -> LoadedCheckpoint | None:
    """Load the last undamaged checkpoint of a run; see `last_checkpoint`."""
    return _first_undamaged(output_dir, _load)


def _load(folder: Path) -> LoadedCheckpoint:
    manifest = Manifest.read(folder)
    if TRAINING_STATE_FILE not in manifest.files:
        raise UnreadableError(
            f"{folder}: holds weights alone, without the state of a training that could be "
            "resumed; start one from it with train.init_checkpoint"
        )
    if manifest.format_version < FORMAT_VERSION:
        raise UnreadableError(
            f"{folder}: an older dn_detr wrote it, and its training cannot be continued; start "
            f"a new run from its weights with train.init_checkpoint={folder}"
        )
    # not mapped: training writes into these tensors
    state = read_pickle(manifest.verify(folder, TRAINING_STATE_FILE), mmap=False)
    if not isinstance(state, dict) or not isinstance(state.get("optimizer"), dict):
        raise CheckpointError(f"{folder / TRAINING_STATE_FILE}: not the state of a training")
    model = read_tensors(folder, manifest, MODEL_FILE)
    ema = read_tensors(folder, manifest, EMA_FILE) if EMA_FILE in manifest.files else None
    optimizer = state.pop("optimizer")
    snapshot = Snapshot(manifest.iteration, manifest.epoch, model, optimizer, state, ema)
    return LoadedCheckpoint(folder, manifest, snapshot)


def best_manifest(checkpoints: Path) -> Manifest | None:
    """Return the manifest of the checkpoint that `best` points at; None if it is not there."""
    try:
        return Manifest.read(checkpoints / BEST_LINK)
    except CheckpointError:
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
    return _first_undamaged(output_dir, _verify)


def _verify(checkpoint: Path) -> Path:
    """Compare every file of a checkpoint with its digest; raise CheckpointError if one differs."""
    manifest = Manifest.read(checkpoint)
    for name in manifest.files:
        manifest.verify(checkpoint, name)
    return checkpoint


def _first_undamaged(output_dir: str | Path, use: Callable[[Path], Used]) -> Used | None:
    """Return `use(checkpoint)` of the last checkpoint of a run for which it raises no error."""
    if (Path(output_dir) / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{output_dir}: itself a checkpoint, not the output folder of a run; start from it "
            f"with train.init_checkpoint={output_dir} and another train.output_dir"
        )
    checkpoints = without_links(Path(output_dir) / CHECKPOINTS_DIR)
    link = checkpoints / LAST_LINK
    present = saved(checkpoints)
    if not present and not link.exists() and not link.is_symlink():
        return None
    last = without_links(link)
    damages = [] if last.exists() else [f"{link}: {_what_is_wrong_with(link)}"]
    # `last`, then earlier ones, the newest first; then those after `last`, nearest first
    candidates = list(reversed(present))
    if last.exists() and last not in present:  # a copy that followed the link
        candidates = [last, *candidates]
    elif last.name.isdigit():
        later = [path for path in present if iteration_of(path) > int(last.name)]
        candidates = [*(path for path in candidates if path not in later), *later]
    for folder in candidates:
        try:
            used = use(folder)
        except UnreadableError as error:
            raise UnreadableError(
                f"{error}; it may be undamaged, so none before it is used instead: solve this, "
                f"or move {folder} away to go on without it"
            ) from error
        except (CheckpointError, OSError) as error:
            damages.append(str(error))
            continue
        if damages:
            logger.error(
                "the last checkpoint cannot be used:\n  %s\n%s is undamaged and is used "
                "instead; what was trained after it is lost",
                "\n  ".join(damages),
                folder,
            )
        return used
    raise CheckpointError(
        f"{checkpoints}: none of the checkpoints can be used:\n  "
        + "\n  ".join(damages)
        + f"\nRestore one from a copy, or delete {checkpoints} to start a new run"
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
        return without_links(folder)
    if is_checkpoint(folder) and folder.parent.is_dir():
        with suggest_undamaged(folder):
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
def suggest_undamaged(checkpoint: Path) -> Iterator[None]:
    """Add the undamaged checkpoints of the same run to an error about one."""
    try:
        yield
    except CheckpointError as error:
        folder = without_links(checkpoint)
        good = []
        for other in saved(folder.parent):
            with suppress(CheckpointError, OSError):
                if other != folder:
                    good.append(str(_verify(other)))
        if not is_checkpoint(checkpoint) or not good:
            raise
        raise CheckpointError(f"{error}; undamaged beside it: {', '.join(good)}") from error


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
