"""Turn a config into plain data that YAML can hold and that reads back as the same config."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, Node

from .errors import ConfigError
from .nodes import children, follow, is_tuple, key_path
from .targets import dotted_name


def to_plain(cfg: Container, *, resolve: bool) -> Any:
    """Plain data of a config.

    Args:
        cfg: root of a config, or a part of one.
        resolve: replace interpolations by their values. A reference to a node with
            `_shared_: true` stays a reference, else the copy would be built apart from it; and
            a mandatory value `???` stays as it is.

    Returns:
        dict, list, tuple and scalars; callables by their dotted names.

    Raises:
        ConfigError: a value has no form in YAML, or an interpolation is broken or circular;
            names the key.
    """
    return _Serializer(cfg, resolve).convert(cfg)


class _Serializer:
    def __init__(self, root: Container, resolve: bool) -> None:
        self._root = root
        self._resolve = resolve
        self._open: list[int] = []  # containers between the root and the current node

    def convert(self, node: Node) -> Any:
        if not self._resolve and node._is_interpolation():
            return node._value()
        if node._is_missing():
            return "???"
        target = follow(node)
        if target is not node and self._stays_reference(target):
            return f"${{{key_path(target)}}}"
        if target._is_none():
            return None
        if isinstance(target, Container):
            return self._convert_container(node, target)
        if isinstance(target._value(), str) and target is not node:
            return _escape(str(target._value()))
        return _leaf(target._value(), node)

    def _stays_reference(self, target: Node) -> bool:
        is_shared = isinstance(target, DictConfig) and target.get("_shared_") is True
        return is_shared and target._get_root() is self._root

    def _convert_container(self, node: Node, target: Container) -> Any:
        if id(target) in self._open:
            raise ConfigError(f"{key_path(node)}: refers to a node that contains it")
        self._open.append(id(target))
        items = {key: self.convert(item) for key, item in children(target)}
        self._open.pop()
        if isinstance(target, DictConfig):
            if isinstance(items.get("_target_"), dict):  # a callable was stored as an object
                items["_target_"] = items["_target_"]["_target_"]
            return items
        assert isinstance(target, ListConfig)
        return tuple(items.values()) if is_tuple(target) else list(items.values())


def _leaf(value: Any, node: Node) -> Any:
    for kind in (bool, int, float, str):  # also their subclasses, such as numpy.float64
        if isinstance(value, kind):
            return kind(value)
    name = dotted_name(value) if callable(value) else None
    if name is not None:
        return {"_target_": name, "_partial_": True}
    path = key_path(node)
    if callable(value):
        raise ConfigError(
            f"{path}: {value!r} cannot be written to YAML because it cannot be imported by a "
            "name; use a named function (or class) of an importable module instead"
        )
    raise ConfigError(
        f"{path}: {value!r} of type {type(value).__name__} cannot be written to YAML; use plain "
        "data (a str for a path or a dtype), or a LazyCall that makes the object"
    )


def _escape(text: str) -> str:
    """Write resolved text such that reading it does not interpolate it again."""
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", text)
