"""Model weights from a file into a model, with one complete account of what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .account import Frame, account, check_finite
from .class_rows import ClassRows, choose_rows, copy_rows, number_of_classes
from .files import read_file
from .layouts import BACKBONE_ONLY, DETREX, OURS, Translation, recognise, to_ours, without_wrapper
from .manifest import CheckpointError

_BACKBONE = "backbone."
_DENOISING = "denoising."


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and how.

    Attributes:
        layout: where the file's names come from: "dn_detr", "official", "detrex", "huggingface",
            "torchvision" or "detectron2".
        fresh: tensors of the model that kept their start values, all of them.
        mapped_classes: classes whose rows were found by name, in the model's order; empty if the
            rows are used as they are.
        notes: one sentence each, for the log.
    """

    layout: str
    fresh: tuple[str, ...] = ()
    mapped_classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_model_weights(
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] = (),
    fine_tune: bool = False,
) -> LoadReport:
    """Load every weight of ``model`` from a checkpoint of any known layout.

    Args:
        model: the module to fill, on any device, not wrapped by DistributedDataParallel. Its
            method ``class_tensors() -> list[str]``, if it has one, names the tensors with a row
            per class.
        path: a checkpoint folder of ours, ``.../checkpoints/last``, a run's output folder, a
            ``.safetensors`` file; a file of the authors' code, of detrex or of transformers (or
            its folder); with ``fine_tune`` a ResNet of torchvision or detectron2.
        class_names: of the model's data; index = class.
        fine_tune: a training starts from the file: classes are mapped by name where both sides'
            names are known, others start anew, and a file of the backbone alone is accepted.
            Without it every tensor must come from the file.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another model; the message lists
            missing, unexpected and mis-shaped names.
    """
    content = read_file(path)
    return load_tensors(
        model,
        content.tensors,
        what=str(path),
        class_names=class_names,
        source_class_names=content.class_names,
        fine_tune=fine_tune,
        notes=content.notes,
        has_config=content.has_config,
    )


@torch.no_grad()
def load_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    what: str = "the weights",
    class_names: Sequence[str] = (),
    source_class_names: Sequence[str | None] = (),
    fine_tune: bool = False,
    notes: Sequence[str] = (),
    has_config: bool = False,
) -> LoadReport:
    """Load every weight of ``model`` from tensors under the names of any known layout.

    Args:
        model: see ``load_model_weights``.
        tensors: name -> tensor, any device.
        what: where they come from, for messages.
        class_names: see ``load_model_weights``.
        source_class_names: of the rows of the tensors' class head, if known.
        fine_tune: see ``load_model_weights``.
        notes: sentences to put before the report's own.
        has_config: the tensors are from a checkpoint folder of ours that holds its config.

    Raises:
        CheckpointError: see ``load_model_weights``; the model is unchanged.
    """
    expected = model.state_dict()
    translation = translate(tensors, what, expected)
    _drop_counters(expected, translation)
    report_notes = [*notes, *_drop_denoising(expected, translation)]
    frame = Frame(what, expected, translation, has_config=has_config)
    alone = translation.layout in BACKBONE_ONLY
    if alone:
        report_notes.append(_accept_backbone(expected, translation, what, fine_tune))
    rows = None
    class_tensors: list[str] = getattr(model, "class_tensors", list)()
    if not alone:
        rows = _class_rows(
            expected,
            translation,
            class_tensors,
            class_names,
            source_class_names,
            fine_tune=fine_tune,
            frame=frame,
        )
    by_row = _copied_by_row(expected, translation, class_tensors, rows)
    wanted = {n: v for n, v in expected.items() if not alone or n.startswith(_BACKBONE)}
    if differences := account(wanted, translation, list(by_row)):
        raise frame.mismatch(differences)
    _check_dilation(model, translation, what)
    check_finite(translation, what)
    report_notes += _notes_on_types(expected, translation)
    for name, value in translation.tensors.items():
        if name in by_row:
            copy_rows(expected[name], value, by_row[name])
        else:
            expected[name].copy_(value)
    mapped: tuple[str, ...] = ()
    anew: set[str] = set()
    if rows is not None and (note := rows.note()):
        report_notes.append(note)
    if rows is not None and not rows.is_identity:
        mapped = rows.mapped
        anew = set() if any(row >= 0 for row in rows.rows) else set(by_row)
    fresh = tuple(name for name in expected if name not in wanted or name in anew)
    return LoadReport(translation.layout, fresh, mapped, tuple(report_notes))


def is_dilated(model: nn.Module) -> bool:
    """Whether the last stage has stride 16 ("DC5"): detrex names such a backbone otherwise."""
    backbone = getattr(model, "backbone", None)
    return list(getattr(backbone, "out_strides", [])) == [16]


def _check_dilation(model: nn.Module, translation: Translation, what: str) -> None:
    """Shapes do not tell a dilated backbone, but detrex's names do."""
    if translation.layout != DETREX or not hasattr(model, "backbone"):
        return
    file_is_dilated = any(n.startswith("backbone.body.") for n in translation.origin.values())
    if file_is_dilated != is_dilated(model):
        kinds = ("one without dilation", "a dilated one (DC5)")
        raise CheckpointError(
            f"{what}: the backbone is {kinds[file_is_dilated]}, that of the model is "
            f"{kinds[not file_is_dilated]}; take the config that has it (model.backbone.dilation)"
        )


def translate(
    tensors: Mapping[str, Tensor], what: str, expected: Collection[str] = ()
) -> Translation:
    """Recognise the layout and bring the tensors under our names.

    Args:
        tensors: under the names of any layout.
        what: where they come from, for messages.
        expected: names of the model; tensors with exactly these need no recognition.

    Raises:
        CheckpointError: aliases that disagree, or a layout that is refused.
    """
    tensors = without_wrapper(tensors)
    if set(tensors) == set(expected):
        return to_ours(tensors, OURS)
    try:
        return to_ours(tensors, recognise(tensors) or OURS)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read name -> tensor (CPU) under the file's own names, verified where there is a manifest.

    Args:
        path: as for ``load_model_weights``.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
    """
    return read_file(path).tensors


def _drop_counters(expected: Mapping[str, Tensor], translation: Translation) -> None:
    """Frozen normalisation has no counter of batches; a trainable one may have had."""
    for name in [n for n in translation.tensors if n.endswith("num_batches_tracked")]:
        if name not in expected:
            del translation.tensors[name]


def _drop_denoising(expected: Mapping[str, Tensor], translation: Translation) -> list[str]:
    """Tensors that matter in training alone, if the model has no denoising."""
    if any(name.startswith(_DENOISING) for name in expected):
        return []
    dropped = [name for name in translation.tensors if name.startswith(_DENOISING)]
    for name in dropped:
        translation.unused[name] = translation.tensors.pop(name)
    if not dropped:
        return []
    return [f"the model has no denoising: {', '.join(map(translation.file_name, dropped))} unused"]


def _accept_backbone(
    expected: Mapping[str, Tensor], translation: Translation, what: str, fine_tune: bool
) -> str:
    if not fine_tune:
        raise CheckpointError(
            f"{what}: a backbone alone ({translation.layout} layout), which detects nothing; train "
            "from it with train.init_checkpoint"
        )
    rest = sum(not name.startswith(_BACKBONE) for name in expected)
    return f"a backbone alone ({translation.layout} layout): the {rest} other tensors start anew"


def _class_rows(
    expected: Mapping[str, Tensor],
    translation: Translation,
    class_tensors: Collection[str],
    class_names: Sequence[str],
    source_class_names: Sequence[str | None],
    *,
    fine_tune: bool,
    frame: Frame,
) -> ClassRows | None:
    model_classes = number_of_classes(expected, class_tensors)
    file_classes = number_of_classes(translation.tensors, class_tensors)
    if model_classes is None or file_classes is None:
        if fine_tune or not (class_names and source_class_names):
            return None
        # Nothing to map, but the names still have to be the same.
        model_classes = file_classes = max(len(class_names), len(source_class_names))
    try:
        rows = choose_rows(
            model_classes,
            file_classes,
            class_names=class_names,
            file_names=source_class_names,
            file_is_coco=translation.layout != OURS,
            fine_tune=fine_tune,
        )
    except CheckpointError as error:
        differences = account(expected, translation, list(class_tensors))
        raise frame.other_classes(str(error), differences) from None
    return rows


def _copied_by_row(
    expected: Mapping[str, Tensor],
    translation: Translation,
    class_tensors: Collection[str],
    rows: ClassRows | None,
) -> dict[str, tuple[list[int], list[int]]]:
    """Class tensors that are copied row by row."""
    if rows is None or rows.is_identity:
        return {}
    found = translation.tensors
    pairs = {
        name: rows.source_of(expected[name], found[name])
        for name in class_tensors
        if name in found and name in expected and found[name].dim()
    }
    return {name: pair for name, pair in pairs.items() if pair is not None}


def _notes_on_types(expected: Mapping[str, Tensor], translation: Translation) -> list[str]:
    changed = {
        (value.dtype, expected[name].dtype)
        for name, value in translation.tensors.items()
        if value.dtype != expected[name].dtype
    }
    return [f"weights of {a} were converted to {b}" for a, b in sorted(changed, key=str)]
