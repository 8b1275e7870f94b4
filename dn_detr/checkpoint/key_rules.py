"""Renaming by pairs of templates that work in both directions.

A template is a whole tensor name in which ``{i}``, ``{j}`` stand for an index and ``*`` for the
rest of the name, for example ``neck.convs.{i}.*``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Pairs = Sequence[tuple[str, str]]

_FIELD = re.compile(r"\{(\w+)\}|\*")


@dataclass(frozen=True)
class KeyRules:
    """Ordered renaming rules; the first template that matches a name decides.

    Attributes:
        pairs: (our template, their template), both with the same fields.
    """

    pairs: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        ours = [(_pattern(our), _replacement(their)) for our, their in self.pairs]
        theirs = [(_pattern(their), _replacement(our)) for our, their in self.pairs]
        object.__setattr__(self, "_from_ours", ours)
        object.__setattr__(self, "_from_theirs", theirs)

    def to_theirs(self, name: str) -> str | None:
        """Their name of one of our tensors; None if they have none."""
        return _rename(name, self._from_ours)  # type: ignore[attr-defined]

    def to_ours(self, name: str) -> str | None:
        """Our name of one of their tensors; None if we have none."""
        return _rename(name, self._from_theirs)  # type: ignore[attr-defined]


def _pattern(template: str) -> re.Pattern[str]:
    parts, end = [], 0
    for field in _FIELD.finditer(template):
        parts.append(re.escape(template[end : field.start()]))
        parts.append(f"(?P<{field[1]}>[0-9]+)" if field[1] else "(?P<rest>.+)")
        end = field.end()
    return re.compile("".join([*parts, re.escape(template[end:])]))


def _replacement(template: str) -> str:
    return _FIELD.sub(lambda field: rf"\g<{field[1] or 'rest'}>", template)


def _rename(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return None
