"""Model weights from a file into a model, with one report of what does not fit."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor, nn

from dn_detr.config.errors import did_you_mean
from dn_detr.errors import first_names, shortened

from .class_rows import ClassRows, choose_rows, copy_rows, number_of_classes
from .files import read_file
from .layouts import Layout, OwnLayout, Translation, as_layouts
from .manifest import CheckpointError
from .tensor_files import FileContent, non_finite

_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*")  # DistributedDataParallel, torch.compile
_BACKBONE = "backbone."
_BODY = "backbone.body."
_DENOISING = "denoising."
_COUNTER = "num_batches_tracked"  # of trainable normalisation; frozen ones have none
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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
    fresh: Sequence[str] = (),
) -> LoadReport:
    """Load every weight of `model` from a checkpoint of any layout that it knows, and log how.

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
        fresh: tensors of the model that keep their initial values whatever the file holds: names,
            or patterns such as `heads.quality.*`.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another model; the message lists
            missing, unexpected and mis-shaped names. Or an entry of `fresh` names no tensor.
    """
    report = load_tensors(
        model,
        read_file(path),
        what=str(path),
        class_names=class_names,
        fine_tune=fine_tune,
        fresh=fresh,
    )
    logger.info("weights from %s (%s layout)", path, report.layout)
    for note in report.notes:
        logger.info("%s: %s", path, note)
    if report.fresh:
        names = first_names(report.fresh, 3)
        count = len(report.fresh)
        logger.warning(
            "%d tensors keep their initial values (%s), everything else is loaded", count, names
        )
    return report


@torch.no_grad()
def load_tensors(
    model: nn.Module,
    weights: Mapping[str, Tensor] | FileContent,
    *,
    what: str = "the weights",
    class_names: Sequence[str] = (),
    fine_tune: bool = False,
    fresh: Sequence[str] = (),
) -> LoadReport:
    """Load every weight of `model` from tensors under the names of any layout that it knows.

    Args:
        model: see `load_model_weights`.
        weights: name -> tensor, any device; or what a file holds.
        what: where they come from, for messages.
        class_names: see `load_model_weights`.
        fine_tune: see `load_model_weights`.
        fresh: see `load_model_weights`.

    Raises:
        CheckpointError: see `load_model_weights`; the model is unchanged.
    """
    content = weights if isinstance(weights, FileContent) else FileContent(dict(weights))
    expected = model.state_dict()
    file = translate(content.tensors, getattr(model, "key_maps", ()), expected, what)
    layout, found, notes = file.layout, file.tensors, list(content.notes)
    has_denoising = any(name.startswith(_DENOISING) for name in expected)
    unused = [name for name in found if name.startswith(_DENOISING) and not has_denoising]
    if unused:
        listed = ", ".join(map(file.file_name, unused))
        notes.append(f"the model has no denoising: {listed} unused")
    initial = _matching(fresh, expected)
    if replaced := sorted(initial & found.keys()):
        notes.append(
            f"values of the file that train.init_fresh leaves out: {first_names(replaced)}"
        )
    wanted = {name: value for name, value in expected.items() if name not in initial}
    for name in {*unused, *initial} & found.keys():
        del found[name]
    if layout.is_backbone:
        if not fine_tune:
            raise CheckpointError(
                f"{what}: a backbone alone ({layout.name} layout), which detects nothing; train "
                "from it with train.init_checkpoint"
            )
        wanted = {name: value for name, value in wanted.items() if name.startswith(_BACKBONE)}
        notes.append(
            f"a backbone alone ({layout.name} layout): the {len(expected) - len(wanted)} other "
            "tensors are re-initialised"
        )

    class_tensors = [name for name in getattr(model, "class_tensors", list)() if name in wanted]
    model_classes = getattr(model, "num_classes", None) or number_of_classes(wanted, class_tensors)
    more = {name: len(wanted[name]) - (model_classes or 0) for name in class_tensors}
    rows, other_classes = ClassRows((), 0), ""
    try:
        rows = choose_rows(
            model_classes,
            number_of_classes(found, class_tensors, more),
            class_names=class_names,
            file_names=content.class_names,
            file_is_coco=layout.is_coco,
            fine_tune=fine_tune,
        )
    except CheckpointError as error:
        other_classes = str(error)
    by_row: dict[str, tuple[list[int], list[int]]] = {}
    for name in class_tensors if not rows.is_identity else ():
        if name in found and (pair := rows.source_of(wanted[name], found[name])):
            by_row[name] = pair
    handled = class_tensors if other_classes else list(by_row)
    if mismatch := _report_mismatch(wanted, file, handled, other_classes, fine_tune=fine_tune):
        raise CheckpointError(f"{what}: {mismatch}")
    try:
        layout.check(file, model)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    _check_finite(file, what)

    dtypes = {(value.dtype, wanted[name].dtype) for name, value in found.items()}
    for before, after in sorted(dtypes, key=str):
        if before != after:
            notes.append(f"weights of {before} were converted to {after}")
    for name, value in found.items():
        if name in by_row:
            copy_rows(wanted[name], value, by_row[name])
        else:
            wanted[name].copy_(value)
    notes += [rows.note] if rows.note else []
    untouched = [name for name in expected if name not in wanted]
    if max(rows.rows, default=0) < 0:  # no class has taken a row
        untouched += by_row
    return LoadReport(layout.name, tuple(untouched), rows.mapped, tuple(notes))


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
    prefix = _WRAPPERS.match(os.path.commonprefix(list(tensors)))  # noqa: RUF071 no path
    tensors = {name[prefix.end() if prefix else 0 :]: value for name, value in tensors.items()}
    best = OwnLayout().to_ours(tensors)
    if tensors.keys() != expected.keys():
        translations = [best, *(layout.to_ours(tensors) for layout in as_layouts(key_maps))]
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


def _matching(patterns: Sequence[str], names: Collection[str]) -> set[str]:
    """Return the names that a pattern fits; one that fits none is an error."""
    fitting = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    for pattern, fits in fitting.items():
        if not fits:
            near = did_you_mean(pattern, names)
            raise CheckpointError(
                f"the model has no tensor {pattern!r}{near}, which should keep its initial values "
                "(train.init_fresh)"
            )
    return set(chain(*fitting.values()))


def _patterns(missing: Sequence[str], names: Collection[str]) -> list[str]:
    """Return patterns for `missing` alone of `names`, one for each module that lacks everything."""
    present = set(names) - set(missing)
    patterns = {}
    for name in missing:
        modules = accumulate(name.split(".")[:-1], "{}.{}".format)
        whole = (f"{m}.*" for m in modules if not any(p.startswith(f"{m}.") for p in present))
        patterns[next(whole, name)] = True
    return list(patterns)


def _report_mismatch(
    wanted: Mapping[str, Tensor],
    file: Translation,
    handled: Sequence[str] = (),
    other_classes: str = "",
    *,
    fine_tune: bool = False,
) -> str:
    """Say what does not fit between a file and a model; an empty string if everything does.

    Args:
        wanted: state of the model that should come from the file.
        file: its tensors under our names.
        handled: names whose shapes may differ.
        other_classes: what is wrong with the file's classes.
        fine_tune: see `load_model_weights`.
    """
    found, layout = file.tensors, file.layout
    names = [name for name in wanted if not name.endswith(_COUNTER)]
    common = [name for name in wanted if name in found]
    missing = [name for name in names if name not in found]
    unexpected = [*(file.file_name(name) for name in found if name not in wanted), *file.unknown]
    of_another_shape = [
        f"{file.file_name(name)} (file {tuple(found[name].shape)}, "
        f"model {tuple(wanted[name].shape)})"
        for name in common
        if name not in handled and found[name].shape != wanted[name].shape
    ]
    of_another_dtype = [
        f"{file.file_name(name)} ({found[name].dtype})"
        for name in common
        if (found[name].dtype in _FLOATS) != wanted[name].is_floating_point()
        or found[name].is_complex()
    ]
    differs = bool(of_another_shape or of_another_dtype)
    if not (missing or unexpected or differs):
        return f"trained on other classes: {other_classes}" * bool(other_classes)
    kind, is_part = "the weights of another model", bool(common) and not (differs or other_classes)
    if is_part and not unexpected:
        kind = "incomplete"
    elif is_part and not missing:
        kind = "the weights of a larger model"
    fitting = len(common) - len(of_another_shape) - len(of_another_dtype)
    lines = [f"{kind} ({layout.name} layout): {fitting} of the model's {len(names)} tensors fit"]
    lines += [other_classes] if other_classes else []
    for title, listed in (
        ("missing from the file", [file.file_name(name) for name in missing]),
        ("unexpected in the file", unexpected),
        ("of another shape", of_another_shape),
        ("of another dtype", of_another_dtype),
    ):
        lines += [f"{len(listed)} {title}:", *_entries(listed)] if listed else []
    patterns = _patterns(missing, names) if kind == "incomplete" and fine_tune else []
    if 0 < len(patterns) <= _LISTED:
        lines.append(
            "If the model has more than the file should hold, let this keep its initial values: "
            f"'train.init_fresh=[{','.join(patterns)}]'"
        )
    elif not common:
        lines.append(
            "None of its names is known: it is of an architecture or a code base without a key map "
            "(model.key_maps)"
        )
    elif isinstance(layout, OwnLayout):
        lines.append(
            "Use the config that it was trained with; a checkpoint of ours has it in manifest.json"
        )
    else:
        lines.append("Use the config of the model that the file holds, if docs/model_zoo.md has it")
    if common and file.unknown:
        lines.append(
            f"{type(layout).__name__} has no name for {file.unknown[0]}: tensors of this model "
            "need a pair in it, others a place in its `ignored` (docs/extending.md)"
        )
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
    return [*(f"  {shortened(name, 300)}" for name in names[:_LISTED]), *rest]
