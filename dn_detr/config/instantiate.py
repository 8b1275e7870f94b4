"""Build the objects that a config describes.

`hydra.utils.instantiate` is not used because it resolves interpolations twice: a text that is
written escaped, and so is only text when a YAML config is checked, would be a call when it is
built. It also copies the objects that it is given, and its errors do not name parameters.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from .errors import ConfigError, did_you_mean
from .nodes import join_path, key_path, to_node, value_of
from .targets import locate


def instantiate(cfg: Any, **kwargs: Any) -> Any:
    """Build a config node, and first everything below it.

    A dict with `_target_` becomes the result of the call; any other dict or list becomes a plain
    one with built elements; a node made from a dataclass becomes an instance of it; anything else
    stays as it is. A node that is referred to by interpolation is built for each reference.
    `_partial_: true` gives `functools.partial(target, **arguments)`, or the target itself when
    there are no arguments.

    Args:
        cfg: a config node (or plain dict or list, or an object, which is returned).
        kwargs: replace keys of the top node, which are not built then.

    Returns:
        The built object.

    Raises:
        ConfigError: a target does not exist, its call failed or does not fit its parameters, or
            a value is missing; names the key of the config. The exception of a failed call is
            chained.
    """
    node = to_node(cfg) if isinstance(cfg, (dict, list, tuple)) else cfg
    if isinstance(node, DictConfig):
        return _build_dict(node, key_path(node), (node,), kwargs)
    if kwargs:
        raise ConfigError(
            f"instantiate: cannot replace {', '.join(kwargs)} in a {type(node).__name__}"
        )
    return _build(node, key_path(node), ()) if isinstance(node, ListConfig) else node


def _build(value: Any, path: str, outer: tuple[Container, ...]) -> Any:
    """Build what lies at `path` below the containers `outer`."""
    if not isinstance(value, Container):
        return value
    if any(value is container for container in outer):
        raise ConfigError(f"{path}: refers to a node that contains it")
    if isinstance(value, DictConfig):
        return _build_dict(value, path, (*outer, value), {})
    assert isinstance(value, ListConfig)
    return [
        _build(value_of(value, index, join_path(path, index)), join_path(path, index),
               (*outer, value))
        for index in range(len(value))
    ]  # fmt: skip


def _build_dict(
    node: DictConfig, path: str, outer: tuple[Container, ...], given: dict[str, Any]
) -> Any:
    if is_dataclass(OmegaConf.get_type(node)):
        return OmegaConf.to_object(node)
    built: dict[Any, Any] = {
        key: _build(value_of(node, key, join_path(path, key)), join_path(path, key), outer)
        for key in node
        if key not in given
    } | given
    is_partial = built.pop("_partial_", None)
    if "_target_" not in built:
        if is_partial is not None:
            raise ConfigError(f"{path}: has _partial_ but no _target_")
        return built
    if is_partial not in (None, True, False):
        raise ConfigError(f"{join_path(path, '_partial_')}: must be true or false")
    target = _find(built.pop("_target_"), join_path(path, "_target_"))
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some builtins have none
        signature = None
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
    where = path or "(top)"
    if signature is not None:
        try:
            (signature.bind_partial if is_partial else signature.bind)(**built)
        except TypeError as error:
            call = name + _text(signature)
            raise ConfigError(f"{where}: {call}: {_misfit(signature, built) or error}") from error
    if is_partial:
        return partial(target, **built) if built else target
    try:
        return target(**built)
    except Exception as error:
        # What went wrong comes first; a ValueError's text says it without its type.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        near = _near_parameter(target, error) if isinstance(error, TypeError) else ""
        raise ConfigError(f"{where}: {kind}{error}{near}\n(while building {name})") from error


def _text(signature: inspect.Signature) -> str:
    """The parameters with their defaults, without types."""
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _misfit(signature: inspect.Signature, arguments: dict[Any, Any]) -> str:
    """Name the argument that is no parameter; "" where something else is wrong."""
    parameters = signature.parameters.values()
    names = [each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY]
    unknown = [str(key) for key in arguments if key not in names]
    if not unknown or any(each.kind is each.VAR_KEYWORD for each in parameters):
        return ""
    return f"it has no parameter {unknown[0]!r}{did_you_mean(unknown[0], names)}"


def _near_parameter(target: Any, error: TypeError) -> str:
    """Suggest a parameter of a base class, to which a constructor passes its `**kwargs`."""
    found = re.search(r"unexpected keyword argument '(\w+)'$", str(error))
    bases = getattr(target, "__mro__", ())
    names = {name for base in bases[:-1] for name in inspect.signature(base).parameters}
    return did_you_mean(found[1], names) if found else ""


def _find(target: Any, where: str) -> Any:
    if isinstance(target, str):
        try:
            target = locate(target)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if not callable(target):
        raise ConfigError(f"{where}: {target!r} cannot be called")
    return target
