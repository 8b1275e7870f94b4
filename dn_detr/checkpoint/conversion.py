"""Weights of any known layout into a checkpoint of ours, or into another code base's layout."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from .class_rows import known_names, may_be_coco
from .coco_classes import COCO_NAMES
from .files import CLASS_NAMES, read_file
from .folders import without_links
from .layouts import OwnLayout
from .manifest import MANIFEST_NAME, CheckpointError, replace_file
from .storage import save_weights
from .weights import LoadReport, load_tensors

OURS = OwnLayout.name


def convert_checkpoint(
    model: nn.Module,
    source: str | Path,
    output: str | Path,
    *,
    to: str = OURS,
    ema: bool = False,
    force: bool = False,
    config: str = "",
) -> LoadReport:
    """Load a file into `model`, every tensor of it, and write the model.

    Args:
        model: of the architecture that the file holds; it is filled.
        source: as for `load_model_weights`.
        output: for "dn_detr" the checkpoint folder to write, else a `.pth` file that holds
            `{"model": state_dict}`, and the list `"class_names"`, a name per row ("" for a
            row without one), if they are known and not COCO's.
        to: "dn_detr", or the name of a layout in the model's `key_maps` that can be written:
            "official", "detrex".
        ema: take the EMA of the file.
        force: replace an `output` that exists.
        config: the model's config as YAML text, for the manifest.

    Returns:
        What was loaded, and how.

    Raises:
        CheckpointError: the file does not fit the model, the layout has no place for the model,
            or `output` exists.
    """
    output = Path(output)
    writable = {each.name: each for each in getattr(model, "key_maps", ()) if each.can_write}
    if to != OURS and to not in writable:
        raise CheckpointError(f"layout {to!r}: choose from {', '.join([OURS, *writable])}")
    _check_output(output, Path(source), is_folder=to == OURS, force=force)
    content = read_file(source, ema=ema)
    report = load_tensors(model, content, what=str(source))
    names = _class_names(model, report, content.class_names)
    if to == OURS:
        save_weights(output, model.state_dict(), config=config, class_names=names)
        return report
    state = writable[to].to_theirs(model.state_dict(), class_names=names, model=model)
    written: dict[str, object] = {"model": state}
    num_classes: int = getattr(model, "num_classes", len(names))
    if not may_be_coco(names, num_classes):
        written[CLASS_NAMES] = [*names, *[""] * (num_classes - len(names))]
    buffer = io.BytesIO()
    torch.save(written, buffer)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, buffer.getbuffer())
    return report


def _check_output(output: Path, source: Path, *, is_folder: bool, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise CheckpointError(f"{output}: exists; choose another output, or replace it (--force)")
    if without_links(output) in (place := without_links(source), *place.parents):
        raise CheckpointError(f"{output}: is the input, or holds it; choose another output")
    if is_folder and not (output / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{output}: in the way, and not a checkpoint that could be replaced")
    if not is_folder and not output.is_file():
        raise CheckpointError(f"{output}: a folder; the layout is written as one file (.pth)")


def _class_names(
    model: nn.Module, report: LoadReport, file_names: tuple[str | None, ...]
) -> tuple[str, ...]:
    """Names of the model's classes where the file says them; published files are COCO's.

    Classes after the last name have none; one before it is "N/A".
    """
    num_classes = getattr(model, "num_classes", len(file_names))
    if report.mapped_classes:
        return report.mapped_classes
    if known := known_names(file_names, num_classes):
        last = max(row for row, name in enumerate(known) if name is not None)
        return tuple(name or "N/A" for name in known[: last + 1])
    if report.layout != OURS and num_classes == len(COCO_NAMES):
        return COCO_NAMES
    return ()
