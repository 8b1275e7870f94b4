"""Build the objects that a config describes.

`hydra.utils.instantiate` is not used because it resolves the whole tree before it builds, which
loses track of shared nodes, merges keyword arguments instead of replacing keys, and does not
name parameters in its errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import AnyNode, Container, DictConfig, ListConfig, Node, flag_override

from .errors import ConfigError, did_you_mean
from .nodes import (
    child,
    children,
    follow,
    has_key,
    is_tuple,
    join_path,
    key_path,
    to_node,
)
from .targets import (
    binding_error,
    is_data,
    locate,
    locate_data,
    parameter_names,
    signature_text,
)

_SPECIAL_KEYS = ("_target_", "_partial_", "_shared_")


def instantiate(cfg: Any, **kwargs: Any) -> Any:
    """Build a config node, and first everything below it.

    A dict with `_target_` becomes the result of the call; any other dict, list or tuple becomes
    a plain one with built elements; anything else stays as it is. A node that is referred to by
    interpolation is built anew for each reference, unless it has `_shared_: true`: then it is
    built once per call of `instantiate`. `_partial_: true` gives `functools.partial(target,
    **arguments)`, or the target itself when there are no arguments.

    Args:
        cfg: a config node (or plain dict or list, or an object, which is returned).
        kwargs: replace keys of the top node before anything is built; interpolations see them.

    Returns:
        The built object.

    Raises:
        ConfigError: a target does not exist or is not allowed, its call failed or does not fit
            its parameters, or a value is missing; names the key of the config. The exception of
            a failed call is chained.
    """
    node = to_node(cfg) if isinstance(cfg, (dict, list, tuple)) else cfg
    if kwargs:
        node = _with_replaced_keys(node, kwargs)
    return _Builder().build(node) if isinstance(node, Container) else node


@dataclass(frozen=True)
class _Given:
    """An argument of `instantiate` that took the place of a config key."""

    value: Any

    def __str__(self) -> str:
        return str(self.value)


def _with_replaced_keys(node: Any, kwargs: dict[str, Any]) -> DictConfig:
    if not isinstance(node, DictConfig):
        raise ConfigError(
            f"instantiate: cannot replace {', '.join(kwargs)} in a {type(node).__name__}"
        )
    copies: dict[int, Any] = {}
    copy.deepcopy(node._get_root(), copies)
    replaced: DictConfig = copies[id(node)] if id(node) in copies else copy.deepcopy(node)
    with flag_override(replaced, ["readonly", "struct"], False):
        for key, value in kwargs.items():
            replaced[key] = AnyNode(_Given(value), flags={"allow_objects": True})
    return replaced


class _Builder:
    """One call of `instantiate`."""

    def __init__(self) -> None:
        self._shared: dict[int, tuple[Node, Any]] = {}  # the node is kept so that its id stays
        self._open: list[int] = []

    def build(self, node: Node) -> Any:
        target = follow(node)
        if target._is_none():
            return None
        if isinstance(target, DictConfig):
            with self._entered(target, key_path(node)):
                return self._build_dict(target)
        if isinstance(target, ListConfig):
            with self._entered(target, key_path(node)):
                items = [self.build(item) for _, item in children(target)]
            return tuple(items) if is_tuple(target) else items
        value = target._value()
        return value.value if isinstance(value, _Given) else value

    @contextmanager
    def _entered(self, node: Node, path: str) -> Iterator[None]:
        if id(node) in self._open:
            raise ConfigError(f"{path}: refers to a node that contains it")
        self._open.append(id(node))
        try:
            yield
        finally:
            self._open.pop()

    def _build_dict(self, node: DictConfig) -> Any:
        if not has_key(node, "_target_"):
            misplaced = [key for key in _SPECIAL_KEYS if has_key(node, key)]
            if misplaced:
                raise ConfigError(f"{key_path(node)}: has {misplaced[0]} but no _target_")
            return {key: self.build(item) for key, item in children(node)}
        if id(node) in self._shared:
            return self._shared[id(node)][1]
        built = self._build_call(node)
        if self._switch(node, "_shared_"):
            self._shared[id(node)] = (node, built)
        return built

    def _build_call(self, node: DictConfig) -> Any:
        target = self._target(node)
        arguments = {
            key: self.build(item) for key, item in children(node) if key not in _SPECIAL_KEYS
        }
        is_partial = self._switch(node, "_partial_")
        _check_arguments(node, target, arguments, is_partial)
        if is_partial:
            return partial(target, **arguments) if arguments else target
        try:
            return target(**arguments)
        except Exception as error:
            # What went wrong comes first; a ValueError's text says it without its type.
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ConfigError(
                f"{_place(node)}: {kind}{error}\n(while building {_call_text(target)})"
            ) from error

    def _switch(self, node: DictConfig, key: str) -> bool:
        if not has_key(node, key):
            return False
        value = self.build(child(node, key))
        if not isinstance(value, bool):
            raise ConfigError(f"{join_path(key_path(node), key)}: must be true or false")
        return value

    def _target(self, node: DictConfig) -> Callable[..., Any]:
        leaf = child(node, "_target_")
        where = join_path(key_path(node), "_target_")
        source = next((place for place in (follow(leaf), leaf) if is_data(place)), None)
        target = self.build(leaf)
        if isinstance(target, str):
            target = _find(target, source, where)
        elif source is not None:
            raise ConfigError(f"{where}: must be a dotted name, got {target!r}")
        if not callable(target):
            raise ConfigError(f"{where}: {target!r} cannot be called")
        return target


def _find(name: str, source: Node | None, where: str) -> Any:
    try:
        return locate(name) if source is None else locate_data(name, source)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:  # the imported module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: importing {name} failed: {reason}") from error


def _check_arguments(
    node: DictConfig, target: Callable[..., Any], arguments: dict[str, Any], is_partial: bool
) -> None:
    problem = binding_error(target, arguments, partial=is_partial)
    if problem is None:
        return
    known = parameter_names(target)
    unknown = [str(key) for key in arguments if known is not None and key not in known]
    if unknown:
        problem = f"it has no parameter {unknown[0]!r}{did_you_mean(unknown[0], known or ())}"
    raise ConfigError(f"{_place(node)}: {_call_text(target)}: {problem}")


def _place(node: DictConfig) -> str:
    return key_path(node) or "(top)"


def _call_text(target: Callable[..., Any]) -> str:
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
    return f"{name}{signature_text(target)}"
