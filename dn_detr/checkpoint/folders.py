"""The folders of a run's checkpoints: named, moved into place, linked, pruned.

A run's folder holds

    output_dir/checkpoints/0000020/{model.safetensors, optimizer.safetensors, ..., manifest.json}
    output_dir/checkpoints/last -> 0000020
    output_dir/checkpoints/best -> 0000010

and, only while something is written or after a kill, hidden ones: `.0000020.partial` is not yet or
no longer a checkpoint, `.0000020.replaced` is one in whose place another is being put.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .manifest import MANIFEST_NAME, flush_to_disk

CHECKPOINTS_DIR = "checkpoints"
LAST_LINK = "last"
BEST_LINK = "best"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINING_STATE_FILE = "training_state.pt"
_PARTIAL = ".partial"
_REPLACED = ".replaced"


def folder_name(iteration: int) -> str:
    """Return the name of the checkpoint folder of an iteration: seven digits, or more."""
    return f"{iteration:07d}"


def is_checkpoint(folder: Path) -> bool:
    """Whether this is, or once was, a checkpoint folder or a link to one."""
    folder = folder.absolute()
    is_in_place = folder.parent.name == CHECKPOINTS_DIR and (
        folder.name.isdigit() or folder.name in (LAST_LINK, BEST_LINK)
    )
    return is_in_place or (folder / MANIFEST_NAME).is_file()


def saved(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, damaged ones too, in the order of their iterations.

    With those that were moved aside when a kill came before their replacement was in place.
    """
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if path.is_dir() and not path.is_symlink()]
    found = {path.name: path for path in folders if path.name.isdigit()}
    for path in folders:
        if path.suffix == _REPLACED and path.stem[1:].isdigit():
            found.setdefault(path.stem[1:], path)
    return [found[name] for name in sorted(found, key=int)]


def iteration_of(folder: Path) -> int:
    """Return the iteration that a folder of `saved` is named after."""
    return int(folder.name.removeprefix(".").removesuffix(_REPLACED))


def partial_of(folder: Path) -> Path:
    """Return the folder to write aside what will be moved to `folder`."""
    return folder.with_name(f".{folder.name}{_PARTIAL}")


def move_into_place(partial: Path, folder: Path) -> None:
    """Rename a complete folder to its name; one that is there is replaced, never lost."""
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def point_link(folder: Path, name: str) -> None:
    """Let the link `name` beside a checkpoint folder point at it, in one atomic replacement."""
    link = folder.with_name(f".{name}{_PARTIAL}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, folder.with_name(name))
    flush_to_disk(folder.parent)


def prune(newest: Path, keep: int | None) -> None:
    """Remove all but `best` and the `keep` newest; later ones are of an abandoned future.

    Args:
        newest: the checkpoint that was just written, which stays.
        keep: >= 1; None keeps all.
    """
    if keep is None:
        return
    checkpoints = newest.parent
    folders = saved(checkpoints)
    kept = [path for path in folders if iteration_of(path) <= iteration_of(newest)][-keep:]
    best = (checkpoints / BEST_LINK).resolve()
    for path in folders:
        if path not in kept and path.resolve() != best:
            hidden = partial_of(path)
            os.rename(path, hidden)  # a kill in the middle of removing leaves no half checkpoint
            shutil.rmtree(hidden)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed or failed writing has left, and put back what was only moved aside."""
    for path in checkpoints.glob(f".*{_REPLACED}"):
        place = path.with_name(path.stem[1:])
        if place.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, place)
    for path in checkpoints.glob(f".*{_PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
