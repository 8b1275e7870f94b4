"""The one complete account of what does not fit between a file and a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .architecture import Traits, describe_architecture, describe_backbone
from .layouts import BACKBONE_ONLY, OURS, Translation, foreign_family
from .manifest import CheckpointError
from .tensor_files import non_finite

_LISTED = 10


def check_finite(translation: Translation, what: str) -> None:
    """Raise CheckpointError if a weight is NaN or infinite."""
    broken = [
        f"{translation.file_name(name)}: {int((~value.isfinite()).sum())} of {value.numel()}"
        for name in non_finite(translation.tensors)
        for value in [translation.tensors[name]]
    ]
    if broken:
        raise CheckpointError(
            f"{what}: holds weights that are NaN or infinite.\n"
            + "\n".join(listing("tensors with such values", broken))
            + "\nThe training that wrote it diverged, or the file is damaged; use another one."
        )


@dataclass(frozen=True)
class Differences:
    """What does not fit between a file and a model, as entries to list.

    Attributes:
        wanted: how many tensors the file should hold.
        missing: names without a tensor in the file.
        others: kind of difference -> names, with what is wrong about them.
    """

    wanted: int
    missing: Sequence[str]
    others: Mapping[str, Sequence[str]]

    def __bool__(self) -> bool:
        return bool(self.missing) or self.has_others

    @property
    def has_others(self) -> bool:
        """Whether anything else than a missing tensor differs."""
        return any(self.others.values())

    def lines(self) -> list[str]:
        """The lists, one entry per line."""
        rest = [line for title, names in self.others.items() for line in listing(title, names)]
        return [*listing("missing from the file", self.missing), *rest]


def account(
    expected: Mapping[str, Tensor], translation: Translation, handled: Sequence[str]
) -> Differences:
    """List all that is missing, unexpected, of another shape or no number.

    Args:
        expected: state of the model.
        translation: the file's tensors under our names.
        handled: names whose shapes may differ.
    """
    found = translation.tensors
    wanted = [name for name in expected if not name.endswith("num_batches_tracked")]
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
    return Differences(
        len(wanted),
        [name for name in wanted if name not in found],
        {
            "unexpected in the file": [*unexpected, *translation.unknown],
            "of another shape": misshapen,
            "of another type": other_type,
        },
    )


@dataclass(frozen=True)
class Frame:
    """What an error about a file and a model says around the account of the differences.

    Attributes:
        what: where the tensors come from.
        expected: state of the model.
        translation: the file's tensors under our names.
        has_config: the file is in a checkpoint folder of ours that holds its config.
    """

    what: str
    expected: Mapping[str, Tensor]
    translation: Translation
    has_config: bool = False

    def mismatch(self, differences: Differences, reason: str = "") -> CheckpointError:
        """The error of a file that holds a part of the model, or of one of another model."""
        file = _look(self.translation)
        if differences.has_others or reason:
            return CheckpointError(
                f"{self.what}: the weights of another model. The file {file}. The model "
                f"{self._model()}.\n"
                + "\n".join([*([reason] if reason else []), *differences.lines()])
                + self._remedy()
            )
        missing = len(differences.missing)
        part = "backbone " if self.translation.layout in BACKBONE_ONLY else ""
        return CheckpointError(
            f"{self.what}: incomplete: {missing} of the model's {differences.wanted} {part}tensors "
            f"{'is' if missing == 1 else 'are'} missing from the file:\n"
            + "\n".join(entries(differences.missing))
            + f"\nThe file {file}."
        )

    def other_classes(self, reason: str, differences: Differences) -> CheckpointError:
        """The error of a file of other classes, whatever else differs."""
        if differences:
            return self.mismatch(differences, reason)
        return CheckpointError(
            f"{self.what}: trained on other classes than the model has. "
            f"{reason[0].upper()}{reason[1:]}"
        )

    def _model(self) -> str:
        if Traits.of(self.expected).num_layers:
            return f"is {describe_architecture(self.expected)}"
        return f"holds {summary(self.expected)}"

    def _remedy(self) -> str:
        translation = self.translation
        if foreign_family([*translation.tensors, *translation.unknown]):
            return ""
        if self.has_config:
            return "\nUse the config that it was trained with (its manifest.json holds it)."
        if translation.layout == OURS:
            return "\nUse the config that the file was trained with."
        return "\nUse the config of the model that the file holds (docs/model_zoo.md)."


def listing(title: str, names: Sequence[str]) -> list[str]:
    """A count, and the first names below it; nothing for no name."""
    return [f"{len(names)} {title}:", *entries(names)] if names else []


def entries(names: Sequence[str]) -> list[str]:
    """The first names, a line for each, and how many more there are."""
    rest = [f"  ... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [*(f"  {name}" for name in names[:_LISTED]), *rest]


def summary(names: Mapping[str, Tensor] | Sequence[str]) -> str:
    """How many tensors there are under which modules."""
    modules = Counter(name.split(".")[0] for name in names)
    parts = ", ".join(f"{module} ({count})" for module, count in modules.most_common(_LISTED))
    return f"{len(names)} tensors: {parts}"


def _look(translation: Translation) -> str:
    # With what the model has no use for: a file looks the same whatever the model is.
    tensors = {**translation.tensors, **translation.unused}
    names = [*tensors, *translation.unknown]
    if family := foreign_family(names):
        return f"looks like {family}"
    if translation.layout in BACKBONE_ONLY:
        body = describe_backbone(name.removeprefix("backbone.body.") for name in tensors)
        return f"is a backbone alone ({translation.layout} layout, {body})"
    if Traits.of(tensors).num_layers:
        return f"looks like {translation.layout} layout, {describe_architecture(tensors)}"
    return f"holds {summary(names)}"
