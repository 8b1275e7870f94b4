"""The names that one code base gives to tensors, and the way between them and ours.

Names are translated by pairs of templates that work in both directions. A template is a whole
tensor name in which `{i}`, `{j}` stand for an index and `*` for the rest of the name, for example
`neck.convs.{i}.*`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import CheckpointError

Pairs = Sequence[tuple[str, str]]

_MOST_DIMENSIONS = 64  # that torch compares
_FIELD = re.compile(r"\{(\w+)\}|\*")


class Renaming:
    """Ordered renaming rules; the first template that matches a name decides.

    Args:
        pairs: (template, template of the new name), both with the same fields.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        pairs = list(pairs)
        if wrong := [pair for pair in pairs if isinstance(pair, str) or len(pair) != 2]:
            raise CheckpointError(f"pairs of a layout: {wrong[0]!r} is none of (our, their name)")
        self._rules = [(_pattern(old), _replacement(new)) for old, new in pairs]

    def __call__(self, name: str) -> str | None:
        """Return the new name; None if no template matches."""
        for pattern, replacement in self._rules:
            if match := pattern.fullmatch(name):
                return match.expand(replacement)
        return None


def _pattern(template: str) -> re.Pattern[str]:
    parts, end = [], 0
    for found in _FIELD.finditer(template):
        parts.append(re.escape(template[end : found.start()]))
        parts.append(f"(?P<{found[1]}>[0-9]+)" if found[1] else "(?P<rest>.+)")
        end = found.end()
    return re.compile("".join([*parts, re.escape(template[end:])]))


def _replacement(template: str) -> str:
    return _FIELD.sub(lambda found: rf"\g<{found[1] or 'rest'}>", template)


@dataclass
class Translation:
    """A file's tensors under our names.

    Attributes:
        layout: that the file was read as.
        tensors: our name -> tensor, sharing memory with the file's where possible.
        origin: our name -> the file's name, where they differ.
        rename: our name -> the layout's, for tensors that the file lacks.
        unknown: names of the file that have no place in any of our models.
        conflicts: two names of the file for one tensor, with other values.
    """

    layout: Layout
    rename: Renaming
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)

    def file_name(self, name: str) -> str:
        """Our name, with the file's in brackets where it differs."""
        theirs = self.origin.get(name) or self.rename(name) or name
        return name if theirs == name else f"{name} ({theirs})"


class Layout(ABC):
    """One code base's names of tensors; a project derives its own and implements `pairs`.

    A file is read as the layout under which most names of the model are found in it.

    Attributes:
        name: in messages, and for `convert_checkpoint` if it can be written.
        is_backbone: files hold a backbone alone, which a training may start from.
        is_coco: heads of 80 or 91 rows are COCO's, if a file does not name its classes.
        can_write: whether `to_theirs` works.
        ignored: names that are nothing to load, such as the classifier of a backbone.
    """

    name = ""
    is_backbone = False
    is_coco = False
    can_write = False
    ignored = re.compile(r"(?!)")

    @abstractmethod
    def pairs(self, names: Collection[str]) -> Pairs:
        """Return pairs of templates (our name, their name).

        Args:
            names: all names of the state to translate, theirs or ours, where they decide.
        """

    def first_name(self, name: str) -> str:
        """Return the name in `pairs` of a tensor that has several, in a file or over versions."""
        return name

    def second_names(self, names: Collection[str]) -> Pairs:
        """Return pairs (their name, second name of the same tensor in files that are written)."""
        return ()

    def arrange(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Join or split tensors that are cut otherwise than ours, still under their names."""
        return tensors

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Translation:
        """Bring a file's tensors under our names.

        Args:
            tensors: their name -> tensor.
        """
        pairs = self.pairs(tensors)
        result = Translation(self, Renaming(pairs))
        to_ours = Renaming((their, our) for our, their in pairs)
        firsts: dict[str, Tensor] = {}
        file_names: dict[str, str] = {}
        for name, value in tensors.items():
            first = self.first_name(name)
            if first in firsts and not _equal(firsts[first], value):
                result.conflicts.append((file_names[first], name))
            if first not in firsts or name == first:
                firsts[first], file_names[first] = value, name
        for first, value in self.arrange(firsts).items():
            name = file_names.get(first, first)
            if self.ignored.fullmatch(first):
                continue
            if our := to_ours(first):
                result.tensors[our], result.origin[our] = value, name
            else:
                result.unknown.append(name)
        return result

    def to_theirs(
        self,
        state: Mapping[str, Tensor],
        *,
        class_names: Sequence[str | None] = (),
        model: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Return our state under their names, second names included; see `rejoin` and `finish`.

        Args:
            state: state_dict of a model of ours.
            class_names: of the model; empty if unknown.
            model: for what names and shapes do not tell.

        Raises:
            CheckpointError: a tensor or a model without a place in this layout.
        """
        to_theirs = Renaming(self.pairs(state))
        to_second = Renaming(self.second_names(state))
        result = {}
        for name, value in self.rejoin(state).items():
            if name.endswith("num_batches_tracked"):
                continue
            their = to_theirs(name)
            if their is None:
                raise CheckpointError(f"{name} has no place in the {self.name} layout")
            result[their] = value
            if second := to_second(their):
                result[second] = value
        return self.finish(result, class_names, model)

    def rejoin(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Undo in our state, still under our names, what `to_ours` did to shapes.

        Raises:
            CheckpointError: a model without a place in this layout.
        """
        return state

    def finish(
        self, theirs: dict[str, Tensor], class_names: Sequence[str | None], model: nn.Module | None
    ) -> dict[str, Tensor]:
        """Change what `to_theirs` will return; its arguments are the same."""
        return theirs

    def check(self, translation: Translation, model: nn.Module) -> None:  # noqa: B027 optional
        """Raise CheckpointError for what does not fit a model although all names and shapes do."""


class OwnLayout(Layout):
    """The names of this library."""

    name = "dn_detr"

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return [("*", "*")]

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`: checkpoints of earlier versions have other names."""
        return re.sub(r"^denoising\.label_embed\.", "denoising.embed.label_embed.", name)


def as_layouts(key_maps: Iterable[Any] | Layout) -> tuple[Layout, ...]:
    """Return the layouts of a model, of which there may be one alone.

    Raises:
        CheckpointError: one is none, or has no name.
    """
    layouts = (key_maps,) if isinstance(key_maps, Layout) else tuple(key_maps)
    for index, each in enumerate(layouts):
        if not isinstance(each, Layout) or not each.name:
            raise CheckpointError(
                f"key_maps[{index}] is {each!r}, not an object of a class derived from "
                "dn_detr.checkpoint.Layout with a `name`; list objects, as in "
                "key_maps = [L(MyLayout)()]"
            )
    return layouts


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.dim() > _MOST_DIMENSIONS:
        return False
    if one.data_ptr() == other.data_ptr() or torch.equal(one, other):
        return True
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)  # NaN is reported later
