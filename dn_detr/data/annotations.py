"""Reading and checking COCO annotation files.

Whatever the JSON and the list of files can show is found here, before training starts: a wrong
structure is an error that names the file and the ids; boxes that cannot be trained on are counted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dn_detr.errors import CONTROL_CHARACTERS, first_names

from .errors import DatasetError

Entry = dict[str, Any]

_REQUIRED_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_LARGEST_COORDINATE = 1e9  # beyond it float32 boxes lose whole pixels by the hundred
_LARGEST_AREA = 1e10  # pycocotools ignores larger objects


def require_paths(image_dir: Path, annotation_file: Path) -> None:
    """Check that a data set is where the config says.

    Raises:
        DatasetError: lists the paths that were tried and how to set them.
    """
    states = {
        annotation_file: "found" if annotation_file.is_file() else "no such file",
        image_dir: "found" if image_dir.is_dir() else "no such directory",
    }
    if all(state == "found" for state in states.values()):
        return
    tried = "\n".join(f"  {path.absolute()}: {state}" for path, state in states.items())
    raise DatasetError(
        f"the data set is not there. Tried:\n{tried}\n"
        "Set the folder that holds train2017/, val2017/ and annotations/ with"
        " dataloader.root=DIR or the environment variable COCO_ROOT. No data at hand? `make demo`"
        " makes some and trains on it (configs/digits_dn_deformable_detr.py)."
    )


def read_annotation_file(path: Path) -> dict[str, list[Entry]]:
    """Read a COCO instances JSON and check its structure.

    `area` is filled with width * height and `iscrowd` with 0 where they are missing.

    Args:
        path: JSON with `images`, `annotations` and `categories`.

    Returns:
        The content of the file; numbers, ids and references in it are sound. Boxes are finite
        but may be empty or lie outside their image.

    Raises:
        DatasetError: names the file, the offending ids and the remedy.
    """
    content: dict[str, list[Entry]] = _parse_json(path)
    sections = ", ".join(_REQUIRED_KEYS)
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: COCO instances JSON is an object with {sections}, this file holds a"
            f" {type(content).__name__}"
        )
    missing = [key for key in _REQUIRED_KEYS if not isinstance(content.get(key), list)]
    if missing:
        raise DatasetError(
            f"{path}: no list under {first_names(missing)}; COCO instances JSON has {sections},"
            f" this file has {first_names(sorted(content)) or 'nothing'}"
        )
    for section in ("images", "categories"):
        if not content[section]:
            raise DatasetError(f"{path}: the list '{section}' is empty")
    for section, keys in _REQUIRED_KEYS.items():
        _check_entries(path, section, content[section], keys)
    refuse = partial(_refuse, path)
    images, categories = content["images"], content["categories"]
    for section, key in (("images", "file_name"), ("categories", "name")):
        nameless = [entry["id"] for entry in content[section] if not _is_name(entry[key])]
        problem = f"{section} without a {key}, or with control characters in it"
        refuse(problem, nameless, "give each one that can be printed")
    times = Counter(category["name"] for category in categories)
    shared = [f"{c['id']} ({c['name']!r})" for c in categories if times[c["name"]] > 1]
    refuse("categories that share a name", shared, "rename or merge them")
    sizeless = [
        image["id"]
        for image in images
        if not all(
            _is_integer(image[side]) and 0 < image[side] < _LARGEST_COORDINATE
            for side in ("width", "height")
        )
    ]
    refuse("images whose width or height is no positive integer", sizeless, "in pixels")
    _check_annotations(path, content)
    return content


def require_image_files(image_dir: Path, file_names: Sequence[str]) -> None:
    """Check that all images exist, by listing each folder once.

    Raises:
        DatasetError: counts the missing files and names the first.
    """
    paths = [image_dir / name for name in file_names]
    present = {
        # os.path takes a name that is too long for one of no folder.
        folder: set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for folder in {path.parent for path in paths}
    }
    missing = [
        name
        for name, path in zip(file_names, paths, strict=True)
        if path.name not in present[path.parent]
    ]
    if missing:
        raise DatasetError(
            f"{image_dir}: {len(missing)} of {len(file_names)} image files are missing:"
            f" {first_names(missing)}; complete the folder or remove them from the annotation file"
        )


def _parse_json(path: Path) -> Any:
    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg});"
            " is the file complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a JSON text in UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists 1000 deep
        raise DatasetError(f"{path}: not plausible as JSON ({error})") from error


def _check_entries(path: Path, section: str, entries: list[Any], keys: tuple[str, ...]) -> None:
    incomplete = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            incomplete.append(f"entry {position} is no object")
        elif lacking := [key for key in keys if key not in entry]:
            incomplete.append(
                f"entry {position} (id {entry.get('id')}) lacks {first_names(lacking)}"
            )
    _refuse(path, f"incomplete '{section}'", incomplete, f"each needs {', '.join(keys)}")
    # pycocotools would make floats of larger ones, and find no image of theirs.
    not_integer = [
        repr(entry["id"])
        for entry in entries
        if not (_is_integer(entry["id"]) and -(2**63) <= entry["id"] < 2**63)
    ]
    remedy = "use integers from -2**63 to 2**63 - 1; 1, 2, 3 will do"
    _refuse(path, f"ids in '{section}' that are no integers of 64 bits", not_integer, remedy)
    times = Counter(entry["id"] for entry in entries)
    duplicates = [id_ for id_, count in times.items() if count > 1]
    _refuse(path, f"duplicate ids in '{section}'", duplicates, "give each entry an id of its own")


def _check_annotations(path: Path, content: dict[str, list[Entry]]) -> None:
    """Check the entries of `annotations` and fill in what they may leave out."""
    refuse = partial(_refuse, path)
    annotations = content["annotations"]
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[section]}
        unknown = [
            f"{a['id']} ({key} {a[key]!r})"
            for a in annotations
            if not _is_integer(a[key]) or a[key] not in known
        ]
        remedy = f"every {key} must be the id of an entry of '{section}'"
        refuse(f"annotations with an unknown {key}", unknown, remedy)
    broken = [f"{a['id']} ({a['bbox']!r})" for a in annotations if not _is_box(a["bbox"])]
    remedy = "a box is [x, y, width, height], four finite numbers in pixels"
    refuse("annotations whose bbox is not four finite numbers", broken, remedy)

    for annotation in annotations:
        if annotation.get("area") is None:
            _, _, width, height = annotation["bbox"]
            annotation["area"] = min(max(width, 0) * max(height, 0), _LARGEST_AREA)
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
    areas = [
        f"{a['id']} ({a['area']!r})"
        for a in annotations
        if not (_is_number(a["area"], _LARGEST_AREA) and a["area"] >= 0)
    ]
    remedy = "leave it out to have w * h"
    refuse("annotations whose area is no number from 0 to 1e10", areas, remedy)
    crowds = [f"{a['id']} ({a['iscrowd']!r})" for a in annotations if a["iscrowd"] not in (0, 1)]
    refuse("annotations whose iscrowd is not 0 or 1", crowds, "leave it out to have 0")


def _refuse(path: Path, problem: str, offenders: Sequence[object], remedy: str) -> None:
    if offenders:
        raise DatasetError(
            f"{path}: {len(offenders)} {problem}: {first_names(offenders)}. Remedy: {remedy}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not CONTROL_CHARACTERS.search(value)


def _is_number(value: Any, limit: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= limit  # NaN compares as False


def _is_box(bbox: Any) -> bool:
    if not (isinstance(bbox, list) and len(bbox) == 4):
        return False
    return all(_is_number(number, _LARGEST_COORDINATE) for number in bbox)
