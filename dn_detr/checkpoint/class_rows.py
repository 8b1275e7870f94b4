"""Which row of a file's class head each class of the model takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from dn_detr.errors import first_names, shortened

from .coco_classes import COCO_NAMES, names_of_coco_rows
from .manifest import CheckpointError

_NO_CLASS = {"", "n/a", "__background__", "background", "no object"}
_LISTED = 10
_MOST_ROWS = 100_000
_Names = tuple[str | None, ...]


@dataclass(frozen=True)
class ClassRows:
    """Rows of the file for the classes of the model.

    Attributes:
        rows: per class of the model its row in the file, -1 where it keeps its initial value.
        file_classes: rows of the file.
        mapped: names of the classes that take their rows by name.
        note: one sentence for the log; an empty string if there is nothing to say.
    """

    rows: tuple[int, ...]
    file_classes: int
    mapped: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether the file's classes are the model's, in its order."""
        return self.rows == tuple(range(self.file_classes))

    def source_of(self, target: Tensor, value: Tensor) -> tuple[list[int], list[int]] | None:
        """Rows of `target` and of `value` to copy; None if the shapes do not allow it.

        A label table has one row more than there are classes, "no object", which is kept as it is.
        """
        if not (target.dim() and value.dim()):
            return None
        more = len(target) - len(self.rows)
        if len(value) - self.file_classes != more or target.shape[1:] != value.shape[1:]:
            return None
        pairs = [(i, row) for i, row in enumerate(self.rows) if row >= 0]
        pairs += [(len(self.rows) + i, self.file_classes + i) for i in range(more)]
        return [i for i, _ in pairs], [row for _, row in pairs]


def number_of_classes(
    tensors: Mapping[str, Tensor],
    class_tensors: Collection[str],
    more: Mapping[str, int] | None = None,
) -> int | None:
    """Classes of a state: the fewest rows among its class tensors; None without any.

    Args:
        tensors: the state.
        class_tensors: names of its tensors with a row per class.
        more: rows that each of them has beside those, such as that of "no object".
    """
    rows = {n: len(tensors[n]) for n in class_tensors if n in tensors and tensors[n].dim()}
    return min((count - (more or {}).get(n, 0) for n, count in rows.items()), default=None)


def choose_rows(
    model_classes: int | None,
    file_classes: int | None,
    *,
    class_names: Sequence[str] = (),
    file_names: Sequence[str | None] = (),
    file_is_coco: bool = False,
    fine_tune: bool = False,
) -> ClassRows:
    """Decide which row of the file each class takes.

    Args:
        model_classes: of the model; None without a tensor that has a row per class.
        file_classes: rows of the file's head; None likewise.
        class_names: of the model's data; classes after the last one have no name.
        file_names: of the file's rows, None for a row without a class.
        file_is_coco: a published file: 80 or 91 rows are COCO's.
        fine_tune: allow classes that keep their initial values, and another order.

    Raises:
        CheckpointError: without `fine_tune`, the file's classes are not the model's; or there are
            more rows than any data has classes.
    """
    if model_classes is None or file_classes is None:
        if fine_tune or not (class_names and file_names):
            return ClassRows((), 0)
        # Nothing to map, but the names still have to be the same.
        model_classes = file_classes = max(len(class_names), len(file_names))
    if file_classes > _MOST_ROWS:
        raise CheckpointError(f"the file has {file_classes} rows of classes, no detector's head")
    theirs = known_names(file_names, file_classes)
    if theirs is None and file_is_coco:
        theirs = names_of_coco_rows(file_classes)
    names = known_names(class_names, model_classes)
    if names is None and theirs is not None and model_classes == len(COCO_NAMES):
        names = COCO_NAMES if may_be_coco(theirs, file_classes) else None
    identity = tuple(range(file_classes))
    if names is not None and theirs is not None:
        if _normals(names) == _normals(theirs):
            return ClassRows(identity, file_classes)
        index = {_normal(name): row for row, name in enumerate(theirs) if name is not None}
        rows = tuple(-1 if name is None else index.get(_normal(name), -1) for name in names)
        is_allowed = fine_tune or list(rows) == sorted(index.values())
    elif model_classes == file_classes:
        order = "its rows are taken in the order of the data's classes"
        note = f"the class names of the file are unknown: {order}" if names is not None else ""
        return ClassRows(identity, file_classes, note=note)
    else:
        rows, is_allowed = (-1,) * model_classes, fine_tune
    if not is_allowed:
        wanted = file_classes if theirs is None else sum(name is not None for name in theirs)
        other = "model" if names is None else "data"
        raise CheckpointError(
            f"the file has {_count(theirs, file_classes)}, the {other} "
            f"{_count(names, model_classes)}{_first_difference(names, theirs)}; use data with the "
            f"same list of categories and model.num_classes={wanted}, or train from it with "
            "train.init_checkpoint"
        )
    pairs = list(zip(names or (None,) * model_classes, rows, strict=True))
    mapped = tuple(name for name, row in pairs if name is not None and row >= 0)
    if len(mapped) == model_classes:
        note = f"{file_classes} class rows were mapped to {model_classes} classes by class name"
    elif mapped:
        others = [name or "(no name)" for name, row in pairs if row < 0]
        note = (
            f"{len(mapped)} of {model_classes} classes take their rows by name "
            f"({first_names(mapped, _LISTED)}); the others are re-initialised "
            f"({first_names(others, _LISTED)})"
        )
    else:
        note = (
            f"the file has {_count(theirs, file_classes)}, the model "
            f"{_count(names, model_classes)}: the classification head is re-initialised"
        )
    return ClassRows(rows, file_classes, mapped, note)


def may_be_coco(names: Sequence[str | None], num_rows: int) -> bool:
    """Whether the names of a head's rows are those of a head trained on COCO, or unknown."""
    known = known_names(names, num_rows)
    coco = names_of_coco_rows(num_rows)
    return known is None or (coco is not None and _normals(known) == _normals(coco))


def known_names(names: Sequence[str | None], count: int) -> _Names | None:
    """One name per row, None for a row without a class; None if the names say nothing."""
    known = tuple(None if _normal(name) in _NO_CLASS else name for name in names)
    if len(names) > count or all(n is None or n.startswith("LABEL_") for n in known):
        return None
    return known + (None,) * (count - len(known))


def copy_rows(target: Tensor, value: Tensor, rows: tuple[list[int], list[int]]) -> None:
    """Copy rows of `value` into rows of `target`, which may be on another device."""
    into, out_of = rows
    if into:
        target[torch.tensor(into, device=target.device)] = value[torch.tensor(out_of)].to(target)


def _count(names: _Names | None, num_rows: int) -> str:
    """How many classes and rows there are, and the first names."""
    named = [name for name in names or () if name is not None]
    if not named:
        return f"{num_rows} classes without names"
    rows = f" in {num_rows} rows" if len(named) != num_rows else ""
    classes = "class" if len(named) == 1 else "classes"
    return f"{len(named)} {classes}{rows} ({first_names(named, 3)})"


def _first_difference(names: _Names | None, theirs: _Names | None) -> str:
    both = zip_longest(*([n for n in side or () if n is not None] for side in (names, theirs)))
    for index, (now, before) in enumerate(both):
        if now and before and _normal(now) != _normal(before):
            was, is_now = shortened(before), shortened(now)
            return f", and class {index} was {was!r} and now is {is_now!r}"
    return ""


def _normal(name: str | None) -> str:
    return "" if name is None else name.strip().casefold()


def _normals(names: Sequence[str | None]) -> list[str]:
    return [_normal(name) for name in names]
