"""Which row of a file's classification each class of the model takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .coco_classes import COCO_NAMES, names_of_coco_rows
from .manifest import CheckpointError

_NO_CLASS = {"", "n/a", "__background__", "background", "no object"}
_LISTED = 10


@dataclass(frozen=True)
class ClassRows:
    """Rows of the file for the classes of the model.

    Attributes:
        rows: per class of the model its row in the file, -1 where it keeps its start value.
        file_classes: rows of the file.
        names: class names of the model, None for a class without one; empty if unknown.
        file_names: the same of the file's rows.
    """

    rows: tuple[int, ...]
    file_classes: int
    names: tuple[str | None, ...] = ()
    file_names: tuple[str | None, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether the file's classes are the model's, in its order."""
        return self.rows == tuple(range(self.file_classes))

    @property
    def mapped(self) -> tuple[str, ...]:
        """Names of the classes that take their rows by name."""
        pairs = zip(self.names, self.rows, strict=False)
        return tuple(name for name, row in pairs if name is not None and row >= 0)

    def note(self) -> str | None:
        """One sentence for the log; None if there is nothing to say."""
        taken = sum(row >= 0 for row in self.rows)
        if self.is_identity:
            if not self.names or self.file_names:
                return None
            return (
                "the class names of the file are unknown: its rows are taken in the order of the "
                "data's classes"
            )
        if taken == len(self.rows):
            return f"{self.file_classes} class rows were mapped to {taken} classes by class name"
        if not taken:
            return (
                f"the file has {_count(self.file_names, self.file_classes)}, the model "
                f"{len(self.rows)}, and {self._why_anew()}: the classification starts anew"
            )
        anew = [n for n, row in zip(self.names, self.rows, strict=True) if row < 0]
        return (
            f"{taken} of {len(self.rows)} classes take their rows by name ({_some(self.mapped)}); "
            f"the others start anew ({_some(anew)})"
        )

    def _why_anew(self) -> str:
        if self.names and self.file_names:
            return "none of their names agree"
        sides = [("the file", self.file_names), ("the data", self.names)]
        unknown = " and of ".join(side for side, names in sides if not names)
        return f"the class names of {unknown} are unknown"

    def source_of(self, target: Tensor, value: Tensor) -> tuple[list[int], list[int]] | None:
        """Rows of ``target`` and of ``value`` to copy; None if the shapes do not allow it.

        A label table has one row more than there are classes, "no object", which is kept as it is.
        """
        more = len(target) - len(self.rows)
        if len(value) - self.file_classes != more or target.shape[1:] != value.shape[1:]:
            return None
        pairs = [(i, row) for i, row in enumerate(self.rows) if row >= 0]
        pairs += [(len(self.rows) + i, self.file_classes + i) for i in range(more)]
        return [i for i, _ in pairs], [row for _, row in pairs]


def number_of_classes(tensors: Mapping[str, Tensor], class_tensors: Collection[str]) -> int | None:
    """Classes of a state: the fewest rows among its class tensors; None without any."""
    return min(
        (len(tensors[n]) for n in class_tensors if n in tensors and tensors[n].dim()), default=None
    )


def choose_rows(
    model_classes: int,
    file_classes: int,
    *,
    class_names: Sequence[str] = (),
    file_names: Sequence[str | None] = (),
    file_is_coco: bool = False,
    fine_tune: bool = False,
) -> ClassRows:
    """Decide which row of the file each class takes.

    Args:
        model_classes: of the model.
        file_classes: rows of the file's head.
        class_names: of the model's data; classes after the last one have no name.
        file_names: of the file's rows, None for a row without a class.
        file_is_coco: a published file: 80 or 91 rows are COCO's.
        fine_tune: allow classes that keep their start values, and another order.

    Raises:
        CheckpointError: without ``fine_tune``, the file's classes are not the model's.
    """
    theirs = known_names(file_names, file_classes)
    if theirs is None and file_is_coco:
        theirs = names_of_coco_rows(file_classes)
    names = known_names(class_names, model_classes)
    if names is None and theirs is not None and _is_coco(theirs, model_classes):
        names = COCO_NAMES
    if names is None or theirs is None:
        return _by_count(model_classes, file_classes, names or (), theirs or (), fine_tune)
    if _normals(names) == _normals(theirs):
        return ClassRows(tuple(range(file_classes)), file_classes, names, theirs)
    index = {_normal(name): row for row, name in enumerate(theirs) if name is not None}
    rows = tuple(-1 if name is None else index.get(_normal(name), -1) for name in names)
    if not fine_tune and list(rows) != sorted(index.values()):
        raise CheckpointError(_disagreement(names, theirs))
    return ClassRows(rows, file_classes, names, theirs)


def may_be_coco(names: Sequence[str | None], num_rows: int) -> bool:
    """Whether the names of a head's rows are those of a head trained on COCO, or unknown."""
    known = known_names(names, num_rows)
    return known is None or _are_rows_of_coco(known)


def _by_count(
    model_classes: int,
    file_classes: int,
    names: tuple[str | None, ...],
    theirs: tuple[str | None, ...],
    fine_tune: bool,
) -> ClassRows:
    if model_classes == file_classes:
        return ClassRows(tuple(range(model_classes)), file_classes, names, theirs)
    if not fine_tune:
        wanted = len(COCO_NAMES) if _are_rows_of_coco(theirs) else file_classes
        raise CheckpointError(
            f"the file has {_count(theirs, file_classes)}, the model {model_classes}; set "
            f"model.num_classes={wanted}, or train from it with train.init_checkpoint"
        )
    return ClassRows((-1,) * model_classes, file_classes, names, theirs)


def _is_coco(names: Sequence[str | None], model_classes: int) -> bool:
    named = tuple(_normal(name) for name in names if name is not None)
    return model_classes == len(COCO_NAMES) and named == COCO_NAMES


def _are_rows_of_coco(names: Sequence[str | None]) -> bool:
    coco = names_of_coco_rows(len(names))
    return coco is not None and _normals(names) == _normals(coco)


def _count(names: Sequence[str | None], num_classes: int) -> str:
    """How many classes a file has, in words; COCO's are 80, however many rows they take."""
    if not _are_rows_of_coco(names):
        return f"{num_classes} classes"
    by_id = "" if len(names) == len(COCO_NAMES) else f" ({len(names)} rows)"
    return f"COCO's {len(COCO_NAMES)} classes{by_id}"


def known_names(names: Sequence[str | None], count: int) -> tuple[str | None, ...] | None:
    """One name per row, None for a row without a class; None if the names say nothing."""
    known = tuple(None if _normal(name) in _NO_CLASS else name for name in names)
    if len(names) > count or all(n is None or n.startswith("LABEL_") for n in known):
        return None
    return known + (None,) * (count - len(known))


def _normal(name: str | None) -> str:
    return "" if name is None else name.strip().casefold()


def _normals(names: Sequence[str | None]) -> list[str]:
    return [_normal(name) for name in names]


def _disagreement(names: Sequence[str | None], theirs: Sequence[str | None]) -> str:
    named = [name for name in theirs if name is not None]
    count = _count(theirs, len(named))
    both = enumerate(zip_longest(names, named))
    differ = [(i, pair) for i, pair in both if _normal(pair[0]) != _normal(pair[1])]
    if not differ:
        return (
            f"the file has {count} in other rows than the model; set model.num_classes={len(named)}"
        )
    index, (now, before) = differ[0]
    return (
        f"the file was trained on {count}, the data has "
        f"{sum(name is not None for name in names)}: class {index} was {_quoted(before)} and now "
        f"is {_quoted(now)}; evaluate on data with the same list of categories (and "
        f"model.num_classes={len(named)}), or train from it with train.init_checkpoint"
    )


def _quoted(name: str | None) -> str:
    return "absent" if name is None else repr(name)


def copy_rows(target: Tensor, value: Tensor, rows: tuple[list[int], list[int]]) -> None:
    """Copy rows of ``value`` into rows of ``target``, which may be on another device."""
    into, out_of = rows
    if into:
        target[torch.tensor(into, device=target.device)] = value[torch.tensor(out_of)].to(target)


def _some(names: Sequence[str | None]) -> str:
    """The first of the names, and how many there are besides and without a name."""
    named = [name for name in names if name is not None]
    text = ", ".join(named[:_LISTED])
    if len(named) > _LISTED:
        text += f", ... {len(named) - _LISTED} more"
    if unnamed := len(names) - len(named):
        text += f"{' and ' if named else ''}{unnamed} without a name"
    return text
