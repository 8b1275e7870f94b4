"""What the config package adds to OmegaConf: objects as values, and dotted keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import AnyNode, Container, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import (
    ConfigIndexError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from .errors import ConfigError
from .targets import dotted_name

_SCALARS = (str, int, float, bool, bytes, Path, Enum, type(None))


def to_node(value: Any) -> Any:
    """Convert plain data to OmegaConf nodes that may hold any object.

    Args:
        value: dict, list or tuple (nested, with nodes and objects inside), a node, or a leaf.

    Returns:
        A DictConfig or ListConfig for a container; nodes and scalars as they are. An instance of
        a dataclass becomes a call of its class, so that it can be overridden and written to YAML;
        any other object, and a class, is kept as it is.
    """
    if isinstance(value, (Node, *_SCALARS)):
        return value
    if is_dataclass(value) and not isinstance(value, type) and (name := dotted_name(type(value))):
        arguments = {item.name: getattr(value, item.name) for item in fields(value) if item.init}
        value = {"_target_": name, **arguments}
    if isinstance(value, dict):
        mapping = DictConfig({}, flags={"allow_objects": True})
        for key, item in value.items():
            mapping[key] = to_node(item)
        return mapping
    if isinstance(value, (list, tuple)):
        return ListConfig([to_node(item) for item in value], flags={"allow_objects": True})
    return AnyNode(value, flags={"allow_objects": True})


def join_path(*parts: Any) -> str:
    """Dotted key of its non-empty parts, as overrides and messages write it (`a.list.0`)."""
    return ".".join(str(part) for part in parts if part != "")


def key_path(node: Container) -> str:
    """The dotted key of a container from the root of its config; "" for the root."""
    absent = len(node) if isinstance(node, ListConfig) else "_absent_"
    try:
        node[absent]
    except (ConfigKeyError, ConfigIndexError) as error:  # which say the whole key
        key = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "")
        return key.removesuffix(str(absent)).strip(".")
    return ""


def value_of(container: Container, key: Any, path: str) -> Any:
    """The value at an existing key or index, an interpolation followed.

    Args:
        container: a DictConfig or ListConfig.
        key: of it.
        path: dotted key of the value, for the message.

    Returns:
        A container as a node, anything else as the value itself.

    Raises:
        ConfigError: an interpolation is broken or circular, or the value is the mandatory `???`.
    """
    try:
        return container[key]
    except MissingMandatoryValue as error:
        raise ConfigError(f"{path}: is mandatory (???) and has no value yet; set it") from error
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path}: cannot resolve the interpolation: {reason}") from error


def plain(cfg: Container) -> Any:
    """Plain dicts and lists of a config, interpolations and other objects as they are written."""
    return OmegaConf.to_container(cfg, resolve=False)


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything below plain data, inner dicts and lists included."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield join_path(path, key), item
            yield from walk(item, join_path(path, key))
