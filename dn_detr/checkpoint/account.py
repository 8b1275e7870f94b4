"""The one complete account of what does not fit between a file and a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .architecture import Traits, describe_architecture
from .layouts import BACKBONE_ONLY, OURS, Translation, foreign_family
from .manifest import CheckpointError

_LISTED = 10


def check_finite(translation: Translation, what: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite."""
    broken = [
        f"{translation.file_name(name)}: {int((~value.isfinite()).sum())} of {value.numel()}"
        for name, value in translation.tensors.items()
        if value.is_floating_point() and not _is_finite(value)
    ]
    if broken:
        raise CheckpointError(
            f"{what}: holds weights that are NaN or infinite.\n"
            + "\n".join(listing("tensors with such values", broken))
            + "\nThe training that wrote it diverged, or the file is damaged; use another one."
        )


def account(
    expected: Mapping[str, Tensor], translation: Translation, handled: Sequence[str]
) -> list[str]:
    """Lines that list all that is missing, unexpected, of another shape or no number.

    Args:
        expected: state of the model.
        translation: the file's tensors under our names.
        handled: names whose shapes may differ.
    """
    found = translation.tensors
    missing = [n for n in expected if n not in found and not n.endswith("num_batches_tracked")]
    unexpected = [translation.file_name(name) for name in found if name not in expected]
    common = [name for name in expected if name in found]
    misshapen = [
        f"{translation.file_name(name)} (file {tuple(found[name].shape)}, "
        f"model {tuple(expected[name].shape)})"
        for name in common
        if name not in handled and found[name].shape != expected[name].shape
    ]
    other_type = [
        f"{translation.file_name(name)} ({found[name].dtype})"
        for name in common
        if found[name].is_floating_point() != expected[name].is_floating_point()
    ]
    return [
        *listing("missing from the file", missing),
        *listing("unexpected in the file", [*unexpected, *translation.unknown]),
        *listing("of another shape", misshapen),
        *listing("of another type", other_type),
    ]


def mismatch(
    what: str, expected: Mapping[str, Tensor], translation: Translation, problems: Sequence[str]
) -> CheckpointError:
    """The error with both architectures and the whole account."""
    found = [*translation.tensors, *translation.unknown]
    if Traits.of(expected).num_layers:
        model = f"The model is {describe_architecture(expected)}."
    else:
        model = f"The model holds {summary(expected)}."
    return CheckpointError(
        f"{what}: the weights of another model. The file {_look(translation)} {model}\n"
        + "\n".join(problems)
        + _remedy(translation, found)
    )


def listing(title: str, entries: Sequence[str]) -> list[str]:
    """A count, and the first entries below it; nothing for no entry."""
    if not entries:
        return []
    rest = [f"  ... and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else []
    return [f"{len(entries)} {title}:", *(f"  {entry}" for entry in entries[:_LISTED]), *rest]


def summary(names: Mapping[str, Tensor] | Sequence[str]) -> str:
    """How many tensors there are under which modules."""
    modules = Counter(name.split(".")[0] for name in names)
    parts = ", ".join(f"{module} ({count})" for module, count in modules.most_common(_LISTED))
    return f"{len(names)} tensors: {parts}"


def _is_finite(value: Tensor) -> bool:
    # The sum of finite numbers may overflow, so only a non-finite sum needs the long way.
    total = value.sum(dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(value.isfinite().all())


def _look(translation: Translation) -> str:
    names = [*translation.tensors, *translation.unknown]
    if family := foreign_family(names):
        return f"looks like {family}."
    if translation.layout in BACKBONE_ONLY:
        return f"is a backbone alone ({translation.layout} layout)."
    if Traits.of(translation.tensors).num_layers:
        architecture = describe_architecture(translation.tensors)
        layout = "our" if translation.layout == OURS else translation.layout
        return f"looks like {layout} layout, {architecture}."
    return f"holds {summary(names)}."


def _remedy(translation: Translation, names: Sequence[str]) -> str:
    if foreign_family(names):
        return ""
    if translation.layout == OURS:
        return "\nUse the config that the checkpoint was trained with (its manifest.json holds it)."
    return "\nUse the config of the model that the file holds (docs/model_zoo.md)."
