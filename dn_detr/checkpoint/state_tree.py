"""Nested states of dicts, lists and tuples: tensors apart from the rest, and the rest as bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .manifest import CheckpointError

_MARK = "__tensor__"  # {_MARK: name} stands where a tensor was
_ANY = "surrogatepass"  # file names may hold what is no text


def take_tensors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Separate the tensors of a nested state from the rest.

    Args:
        tree: dicts, lists and tuples of tensors and other values, such as an optimizer's state.

    Returns:
        The tree with a mark in the place of each tensor; and path, joined by dots -> tensor.
    """
    tensors: dict[str, Tensor] = {}

    def take(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            assert path not in tensors, f"two tensors would be called {path}"
            tensors[path] = value
            return {_MARK: path}
        if isinstance(value, Mapping):
            return {key: take(item, _join(path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [take(item, _join(path, index)) for index, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return value

    return take(tree, ""), tensors


def put_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `take_tensors`.

    Raises:
        KeyError: there is no tensor for a mark.
    """
    if isinstance(tree, Mapping):
        if set(tree) == {_MARK}:
            return tensors[tree[_MARK]]
        return {key: put_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        items = [put_tensors(value, tensors) for value in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    return tree


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """Serialise a small state so that `torch.load(weights_only=True)` reads it.

    Equal states give equal bytes, whoever else refers to their parts.

    Args:
        state: tensors, numbers, strings, None, and lists, tuples and dicts of them.

    Raises:
        CheckpointError: it holds something else.
    """
    file = io.BytesIO()
    torch.save(_rebuild(state, "training_state", {}), file)
    return file.getvalue()


def _rebuild(value: Any, path: str, known: dict[str, str]) -> Any:
    # A pickle refers back to an object that it has met before, but repeats one that is only equal.
    # So each string becomes one new object, and all else that it could refer to a new one.
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return known.setdefault(value, value.encode("utf-8", _ANY).decode("utf-8", _ANY))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
    if isinstance(value, Mapping):
        return {
            _rebuild(key, path, known): _rebuild(item, _join(path, key), known)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_rebuild(item, _join(path, index), known) for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CheckpointError(
        f"{path} is of type {type(value).__name__}, which could not be loaded again without "
        "running code; save tensors, numbers, strings, lists, tuples and dicts"
    )


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
