"""The folders of a run's checkpoints: named, moved into place, linked, pruned.

A run's folder holds

    output_dir/checkpoints/0000020/{model.safetensors, training_state.pt, ..., manifest.json}
    output_dir/checkpoints/last -> 0000020
    output_dir/checkpoints/best -> 0000010

and, only while something is written or after a kill, hidden ones: `.0000020.partial` is not yet or
no longer a checkpoint, `.0000020.replaced` is one in whose place another is being put.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from .manifest import MANIFEST_NAME, CheckpointError, Manifest, flush_to_disk

CHECKPOINTS_DIR = "checkpoints"
LAST_LINK = "last"
BEST_LINK = "best"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
TRAINING_STATE_FILE = "training_state.pt"
_PARTIAL = ".partial"
_REPLACED = ".replaced"

logger = logging.getLogger(__name__)


def without_links(path: Path) -> Path:
    """Return where a path leads; one of links in a circle leads to nothing, which is no error."""
    return Path(os.path.realpath(path))


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
    found = {path.name: path for path in folders if _is_folder_name(path.name)}
    for path in folders:
        if path.suffix == _REPLACED and _is_folder_name(path.stem[1:]):
            found.setdefault(path.stem[1:], path)
    return [found[name] for name in sorted(found, key=int)]


def _is_folder_name(name: str) -> bool:
    return name.isdecimal() and name == folder_name(int(name))


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
        _remove(replaced)
        os.rename(folder, replaced)
    os.rename(partial, folder)
    flush_to_disk(folder.parent)
    _remove(replaced)


def point_link(folder: Path, name: str) -> None:
    """Let the link `name` beside a checkpoint folder point at it, in one atomic replacement."""
    link, place = folder.with_name(f".{name}{_PARTIAL}"), folder.with_name(name)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    copy = folder.with_name(f".{name}{_REPLACED}")
    if place.is_dir() and not place.is_symlink():  # of a run that was copied without its links
        os.rename(place, copy)
    os.replace(link, place)
    flush_to_disk(folder.parent)
    _remove(copy)


def prune(newest: Path, keep: int | None) -> None:
    """Remove all but `best` and the `keep` newest; later ones are of an abandoned future.

    What cannot be removed stays, and is no error.

    Args:
        newest: the checkpoint that was just written, which stays.
        keep: >= 1; None keeps all.
    """
    if keep is None:
        return
    checkpoints = newest.parent
    folders = saved(checkpoints)
    best = without_links(checkpoints / BEST_LINK)
    until_newest = [path for path in folders if iteration_of(path) <= iteration_of(newest)]
    later = [path for path in folders[len(until_newest) :] if _is_of_its_iteration(path)]
    for path in [*until_newest[:-keep], *later]:
        if without_links(path) == best or not os.access(path, os.W_OK):  # write-protected
            continue
        if path in later:
            logger.warning("removing %s: the run went on from a checkpoint before it", path)
        hidden = partial_of(path)
        os.rename(path, hidden)  # a kill in the middle of removing leaves no half checkpoint
        _remove(hidden)


def _is_of_its_iteration(folder: Path) -> bool:
    """Whether a folder is what its name says, and not a copy under another number."""
    try:
        return Manifest.read(folder).iteration == iteration_of(folder)
    except CheckpointError:
        return False


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed or failed writing has left, and put back what was only moved aside."""
    for path in checkpoints.glob(f".*{_REPLACED}"):
        place = path.with_name(path.stem[1:])
        if place.exists():
            _remove(path)
        else:
            os.rename(path, place)
    for path in checkpoints.glob(f".*{_PARTIAL}"):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there; only warn where that cannot be done."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)
