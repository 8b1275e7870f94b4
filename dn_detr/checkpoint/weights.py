"""Model weights from a file into a model, with one report of what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .class_rows import ClassRows, choose_rows, copy_rows, number_of_classes
from .files import read_file
from .layouts import Layout, OwnLayout, Translation
from .manifest import CheckpointError
from .tensor_files import non_finite

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_BACKBONE = "backbone."
_BODY = "backbone.body."
_DENOISING = "denoising."
_COUNTER = "num_batches_tracked"  # of trainable normalisation; frozen ones have none
_LISTED = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and how.

    Attributes:
        layout: where the file's names come from: "dn_detr", "official", "detrex", "huggingface",
            "torchvision", "detectron2" or a project's own.
        fresh: tensors of the model that kept their initial values, all of them.
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
    """Load every weight of `model` from a checkpoint of any layout that it knows.

    Args:
        model: the module to fill, on any device, not wrapped by DistributedDataParallel. Its
            attribute `key_maps`, if it has one, holds the layouts of other code bases that it
            understands; its method `class_tensors() -> list[str]`, if it has one, names the
            tensors with a row per class.
        path: a checkpoint folder of ours, `.../checkpoints/last`, a run's output folder, a
            `.safetensors` file; a file of torch, or a folder of transformers; with `fine_tune` also
            a backbone alone.
        class_names: of the model's data; index = class.
        fine_tune: a training starts from the file: classes are mapped by name where both sides'
            names are known, others are re-initialised, and a file of the backbone alone is
            accepted. Without it every tensor must come from the file.

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
    """Load every weight of `model` from tensors under the names of any layout that it knows.

    Args:
        model: see `load_model_weights`.
        tensors: name -> tensor, any device.
        what: where they come from, for messages.
        class_names: see `load_model_weights`.
        source_class_names: of the rows of the tensors' class head, if known.
        fine_tune: see `load_model_weights`.
        notes: sentences to put before the report's own.
        has_config: the tensors are from a checkpoint folder of ours that holds its config.

    Raises:
        CheckpointError: see `load_model_weights`; the model is unchanged.
    """
    expected = model.state_dict()
    translation = translate(tensors, getattr(model, "key_maps", ()), expected, what)
    layout, found = translation.layout, translation.tensors
    report_notes = list(notes)
    if not any(name.startswith(_DENOISING) for name in expected):
        unused = [name for name in found if name.startswith(_DENOISING)]
        if unused:
            listed = ", ".join(map(translation.file_name, unused))
            report_notes.append(f"the model has no denoising: {listed} unused")
        for name in unused:
            del found[name]

    wanted = expected
    class_tensors: list[str] = []
    if layout.is_backbone:
        if not fine_tune:
            raise CheckpointError(
                f"{what}: a backbone alone ({layout.name} layout), which detects nothing; train "
                "from it with train.init_checkpoint"
            )
        wanted = {name: value for name, value in expected.items() if name.startswith(_BACKBONE)}
        report_notes.append(
            f"a backbone alone ({layout.name} layout): the {len(expected) - len(wanted)} other "
            "tensors are re-initialised"
        )
    elif hasattr(model, "class_tensors"):
        class_tensors = cast(Any, model).class_tensors()

    by_row: dict[str, tuple[list[int], list[int]]] = {}
    rows, other_classes = None, ""
    try:
        rows = _class_rows(
            translation, expected, class_tensors, class_names, source_class_names, fine_tune
        )
    except CheckpointError as error:
        other_classes = str(error)
    if rows is not None and not rows.is_identity:
        for name in class_tensors:
            if name in found and name in expected and found[name].dim():
                pair = rows.source_of(expected[name], found[name])
                if pair is not None:
                    by_row[name] = pair
    handled = class_tensors if other_classes else list(by_row)
    if mismatch := _report_mismatch(wanted, translation, handled, other_classes, has_config):
        raise CheckpointError(f"{what}: {mismatch}")
    try:
        layout.check(translation, model)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    _check_finite(translation, what)

    dtypes = {(value.dtype, expected[name].dtype) for name, value in found.items()}
    for before, after in sorted(dtypes, key=str):
        if before != after:
            report_notes.append(f"weights of {before} were converted to {after}")
    for name, value in found.items():
        if name in by_row:
            copy_rows(expected[name], value, by_row[name])
        else:
            expected[name].copy_(value)
    fresh = [name for name in expected if name not in wanted]
    mapped: tuple[str, ...] = ()
    if rows is not None:
        report_notes += [rows.note] if rows.note else []
        if not rows.is_identity:
            mapped = rows.mapped
            fresh += [] if any(row >= 0 for row in rows.rows) else list(by_row)
    return LoadReport(layout.name, tuple(fresh), mapped, tuple(report_notes))


def log_loading(checkpoint: str | Path, report: LoadReport) -> None:
    """Log what weights a model got, and warn of what it did not get.

    Args:
        checkpoint: what was loaded.
        report: of `load_model_weights`.
    """
    logger.info("weights from %s (%s layout)", checkpoint, report.layout)
    for note in report.notes:
        logger.info("%s: %s", checkpoint, note)
    if report.fresh:
        logger.warning(
            "%d tensors keep their initial values (%s%s), everything else is loaded",
            len(report.fresh),
            ", ".join(report.fresh[:3]),
            ", ..." if len(report.fresh) > 3 else "",
        )


@torch.no_grad()
def load_backbone(
    body: nn.Module, tensors: Mapping[str, Tensor], key_maps: Sequence[Layout], what: str
) -> None:
    """Load every tensor of a backbone from a file that holds one.

    Args:
        body: the backbone, with torchvision's names: `conv1.weight`, `layer1.0.conv1.weight`, ...
        tensors: of a backbone, which may have further stages and a classifier, or of a detector.
        key_maps: layouts that are known besides ours.
        what: where the tensors come from, for messages.

    Raises:
        CheckpointError: something is missing, unexpected or of another shape.
    """
    expected = {_BODY + name: value for name, value in body.state_dict().items()}
    translation = translate(tensors, key_maps, expected, what)
    parts = tuple(f"{_BODY}{name}." for name, _ in body.named_children())
    found = {name: v for name, v in translation.tensors.items() if name.startswith(parts)}
    translation.tensors, translation.unknown = found, []
    if mismatch := _report_mismatch(expected, translation):
        raise CheckpointError(f"{what}: {mismatch}")
    _check_finite(translation, what)
    for name, value in found.items():
        expected[name].copy_(value)


def translate(
    tensors: Mapping[str, Tensor],
    key_maps: Sequence[Layout],
    expected: Mapping[str, Tensor],
    what: str,
) -> Translation:
    """Bring tensors under our names, from the layout that gives the most names of a model.

    Args:
        tensors: under the names of any layout.
        key_maps: layouts that are known besides ours.
        expected: state of the model.
        what: where the tensors come from, for messages.

    Raises:
        CheckpointError: two names of one tensor disagree.
    """
    tensors = _without_wrapper(tensors)
    best = OwnLayout().to_ours(tensors)
    if tensors.keys() != expected.keys():
        translations = [best, *(layout.to_ours(tensors) for layout in key_maps)]
        best = max(translations, key=lambda each: len(each.tensors.keys() & expected.keys()))
    for first, second in best.conflicts:
        raise CheckpointError(
            f"{what}: {first} and {second} are two names of one tensor, but they disagree"
        )
    best.tensors = {
        name: value
        for name, value in best.tensors.items()
        if name in expected or not name.endswith(_COUNTER)
    }
    return best


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read name -> tensor (CPU) under the file's own names, verified where there is a manifest.

    Args:
        path: as for `load_model_weights`.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
    """
    return read_file(path).tensors


def _without_wrapper(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefix that a wrapper of the model puts before every name."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_wrapper({n.removeprefix(prefix): v for n, v in tensors.items()})
    return dict(tensors)


def _class_rows(
    translation: Translation,
    expected: Mapping[str, Tensor],
    class_tensors: Sequence[str],
    class_names: Sequence[str],
    source_class_names: Sequence[str | None],
    fine_tune: bool,
) -> ClassRows | None:
    """Choose the rows of the classes; None if there is nothing to choose."""
    model_classes = number_of_classes(expected, class_tensors)
    file_classes = number_of_classes(translation.tensors, class_tensors)
    if model_classes is None or file_classes is None:
        if fine_tune or not (class_names and source_class_names) or translation.layout.is_backbone:
            return None
        # Nothing to map, but the names still have to be the same.
        model_classes = file_classes = max(len(class_names), len(source_class_names))
    return choose_rows(
        model_classes,
        file_classes,
        class_names=class_names,
        file_names=source_class_names,
        file_is_coco=translation.layout.is_coco,
        fine_tune=fine_tune,
    )


def _report_mismatch(
    wanted: Mapping[str, Tensor],
    translation: Translation,
    handled: Sequence[str] = (),
    other_classes: str = "",
    has_config: bool = False,
) -> str:
    """Say what does not fit between a file and a model; an empty string if everything does.

    Args:
        wanted: state of the model that should come from the file.
        translation: the file's tensors under our names.
        handled: names whose shapes may differ.
        other_classes: what is wrong with the file's classes.
        has_config: see `load_tensors`.
    """
    found = translation.tensors
    names = [name for name in wanted if not name.endswith(_COUNTER)]
    common = [name for name in wanted if name in found]
    missing = [name for name in names if name not in found]
    others = {
        "unexpected in the file": [
            *(translation.file_name(name) for name in found if name not in wanted),
            *translation.unknown,
        ],
        "of another shape": [
            f"{translation.file_name(name)} (file {tuple(found[name].shape)}, "
            f"model {tuple(wanted[name].shape)})"
            for name in common
            if name not in handled and found[name].shape != wanted[name].shape
        ],
        "of another dtype": [
            f"{translation.file_name(name)} ({found[name].dtype})"
            for name in common
            if found[name].is_floating_point() != wanted[name].is_floating_point()
        ],
    }
    if not missing and not any(others.values()):
        return f"trained on other classes: {other_classes}" * bool(other_classes)
    layout = translation.layout.name
    if common and not any(others.values()) and not other_classes:
        return (
            f"incomplete: {len(missing)} of the model's {len(names)} tensors are missing from the "
            f"file ({layout} layout):\n" + "\n".join(_entries(missing))
        )
    fitting = len(common) - len(others["of another shape"]) - len(others["of another dtype"])
    lines = [
        f"the weights of another model ({layout} layout): {fitting} of the model's {len(names)} "
        "tensors fit"
    ]
    lines += [other_classes] if other_classes else []
    for title, listed in {"missing from the file": missing, **others}.items():
        if listed:
            lines += [f"{len(listed)} {title}:", *_entries(listed)]
    if not common:
        lines.append(
            "None of its names is known: it is of an architecture or a code base without a key map "
            "(model.key_maps)"
        )
    elif isinstance(translation.layout, OwnLayout):
        manifest = " (its manifest.json holds it)" if has_config else ""
        lines.append(f"Use the config that it was trained with{manifest}")
    else:
        lines.append("Use the config of the model that the file holds, if docs/model_zoo.md has it")
    return "\n".join(lines)


def _check_finite(translation: Translation, what: str) -> None:
    broken = [
        f"{translation.file_name(name)}: {int((~value.isfinite()).sum())} of {value.numel()}"
        for name in non_finite(translation.tensors)
        for value in [translation.tensors[name]]
    ]
    if broken:
        raise CheckpointError(
            f"{what}: {len(broken)} tensors hold weights that are NaN or infinite:\n"
            + "\n".join(_entries(broken))
            + "\nThe training that wrote it diverged, or the file is damaged; use another one"
        )


def _entries(names: Sequence[str]) -> list[str]:
    """A line for each of the first names, and how many more there are."""
    rest = [f"  ... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [*(f"  {name}" for name in names[:_LISTED]), *rest]
