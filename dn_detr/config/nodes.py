"""What the config package adds to OmegaConf's nodes: tuples, key paths, checked references.

OmegaConf has no tuple. A tuple is kept as a ListConfig with a node flag, so that its elements can
hold interpolations and can be overridden one by one; `plain`, `instantiate` and the YAML writer
turn it into a tuple again.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import AnyNode, Container, DictConfig, ListConfig, Node
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError

_TUPLE_FLAG = "tuple"
_SCALARS = (str, int, float, bool, bytes, Path, Enum, type(None))


def to_node(value: Any) -> Any:
    """Convert plain data to OmegaConf nodes that remember tuples and may hold any object.

    Args:
        value: dict, list or tuple (nested, with nodes and objects inside), a node, or a leaf.

    Returns:
        A DictConfig or ListConfig for a container; nodes and scalars as they are; any other
        object wrapped, so that OmegaConf does not take a dataclass apart.
    """
    if isinstance(value, (Node, *_SCALARS)):
        return value
    if isinstance(value, dict):
        mapping = DictConfig({}, flags={"allow_objects": True})
        for key, item in value.items():
            mapping[key] = to_node(item)
        return mapping
    if isinstance(value, (list, tuple)):
        sequence = ListConfig([to_node(item) for item in value], flags={"allow_objects": True})
        if isinstance(value, tuple):
            mark_tuple(sequence)
        return sequence
    return AnyNode(value, flags={"allow_objects": True})


def mark_tuple(node: ListConfig) -> None:
    """Make a ListConfig stand for a tuple."""
    node._set_flag(_TUPLE_FLAG, True)


def is_tuple(node: ListConfig) -> bool:
    """Whether a ListConfig stands for a tuple."""
    return bool(node._get_node_flag(_TUPLE_FLAG))


def key_path(node: Node) -> str:
    """The dotted key of a node from the root of its config, list indices included (`a.list.0`).

    The same form is used in overrides, in interpolations and in messages.
    """
    parts: list[str] = []
    place: Node | None = node
    while place is not None and place._key() is not None:
        parts.insert(0, str(place._key()))
        place = place._get_parent()
    return ".".join(parts)


def join_path(*parts: Any) -> str:
    """Dotted key of its non-empty parts."""
    return ".".join(str(part) for part in parts if part != "")


def child(container: Container, key: Any) -> Node:
    """The node at an existing key or index, an interpolation not followed."""
    node = container._get_node(key)
    assert isinstance(node, Node)
    return node


def children(container: Container) -> Iterator[tuple[Any, Node]]:
    """Keys (or indices) and nodes of a container, interpolations not followed.

    Nothing comes out of a container that is null, missing or itself an interpolation.
    """
    if container._is_none() or container._is_missing() or container._is_interpolation():
        return
    if isinstance(container, DictConfig):
        keys: list[Any] = list(container.keys())
    else:
        assert isinstance(container, ListConfig)
        keys = list(range(len(container)))
    for key in keys:
        yield key, child(container, key)


def has_key(container: Container, key: Any) -> bool:
    """Whether a key is written in a container; OmegaConf's `in` denies keys of missing values."""
    return any(written == key for written, _ in children(container))


def follow(node: Node) -> Node:
    """The node that an interpolation leads to; any other node is returned as it is.

    Raises:
        ConfigError: the interpolation is broken, circular or leads to a missing value, or the
            value is the mandatory `???`.
    """
    try:
        target = node._dereference_node()
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = node._value()
        raise ConfigError(f"{key_path(node)}: cannot resolve {text!r}: {reason}") from error
    if target._is_missing():
        raise ConfigError(f"{key_path(node)}: is mandatory (???) and has no value yet; set it")
    return target


def plain(node: Node) -> Any:
    """The value of a node as plain Python data, interpolations resolved, nothing instantiated.

    Raises:
        ConfigError: see `follow`.
    """
    node = follow(node)
    if node._is_none():
        return None
    if isinstance(node, DictConfig):
        return {key: plain(item) for key, item in children(node)}
    if isinstance(node, ListConfig):
        items = [plain(item) for _, item in children(node)]
        return tuple(items) if is_tuple(node) else items
    return node._value()


def key_paths(container: Container, prefix: str = "") -> Iterator[str]:
    """Dotted keys of every node below a container, inner nodes included, in file order."""
    for key, node in children(container):
        path = join_path(prefix, key)
        yield path
        if isinstance(node, Container):
            yield from key_paths(node, path)
