"""Apply command-line overrides in hydra's grammar to a config, strictly.

The rules are listed in docs/configs.md. hydra's parser reads the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, Node

from .errors import ConfigError, did_you_mean_key
from .nodes import (
    child,
    children,
    follow,
    is_tuple,
    join_path,
    key_path,
    key_paths,
    mark_tuple,
    plain,
    to_node,
)
from .value_types import fit_value


class _Action(Enum):
    SET = OverrideType.CHANGE
    ADD = OverrideType.ADD
    SET_OR_ADD = OverrideType.FORCE_ADD
    DELETE = OverrideType.DEL


@dataclass(frozen=True)
class _Command:
    token: str
    action: _Action
    key: str
    value: Any
    has_value: bool


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """See `LazyConfig.apply_overrides`."""
    changed = copy.deepcopy(cfg)
    parser = OverridesParser.create()
    for token in overrides:
        try:
            _apply(changed, _parse(parser, token))
        except ConfigError as error:
            raise ConfigError(f"override {token!r}: {error}") from error
    return changed


def _apply(root: DictConfig, command: _Command) -> None:
    parent, key = _parent_of(root, command)
    if command.action is _Action.DELETE:
        _delete(parent, key, command)
    else:
        _assign(parent, key, command.value, command)


# --- reading a token -----------------------------------------------------------------------


def _parse(parser: OverridesParser, token: str) -> _Command:
    if token.startswith("-"):
        raise ConfigError("looks like an option, but there is none so named")
    try:
        parsed = parser.parse_override(token)
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{_syntax_remedy(token)} ({reason})") from error
    if parsed.package is not None or "/" in parsed.key_or_group or not parsed.key_or_group:
        raise ConfigError("write key=value with a key such as train.seed")
    if parsed.is_sweep_override():
        raise ConfigError(
            "is a sweep over several values, which cannot be trained at once; "
            f"a list is {parsed.key_or_group}=[1,2], a text with a comma needs quotes"
        )
    _refuse_python_none(parsed)
    return _Command(
        token=token,
        action=_Action(parsed.type),
        key=parsed.key_or_group,
        value=parsed.value(),
        has_value=parsed.value_type is not None,
    )


def _syntax_remedy(token: str) -> str:
    key, equals, value = token.partition("=")
    if not equals:
        return "write key=value, or ~key to delete a key"
    if "[" in key:
        return "write a list index as a part of the key: list.0=value"
    if value.startswith("("):
        return f"write a list, {key}=[1,2]; where the config has a tuple it becomes a tuple"
    quote = '"' if "'" in value else "'"
    shell_quote = "'" if quote == '"' else '"'
    text = value.strip("'\"")
    return (
        "quote a value with special characters, for hydra and again for the shell: "
        f"{shell_quote}{key}={quote}{text}{quote}{shell_quote}"
    )


def _refuse_python_none(parsed: Override) -> None:
    if any(value == "None" for value in _unquoted_texts(parsed._value)):
        raise ConfigError(
            "None is the text 'None' here; write null for no value, or 'None' "
            "in quotes for the text"
        )


def _unquoted_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _unquoted_texts(item)
    else:
        assert isinstance(value, (int, float, QuotedString, type(None)))


# --- finding the place ---------------------------------------------------------------------


def _parent_of(root: DictConfig, command: _Command) -> tuple[Container, Any]:
    *outer, last = command.key.split(".")
    container: Container = root
    for part in outer:
        key = _existing_key(container, part)
        if key is None:
            container = _add_dict(container, part, command)
        else:
            container = _enter(child(container, key))
    key = _existing_key(container, last)
    return container, last if key is None else key


def _existing_key(container: Container, part: str) -> Any:
    """The key or index that a part of a dotted key names; None when there is none."""
    if isinstance(container, ListConfig):
        index = int(part) if part.isdecimal() else len(container)
        return index if index < len(container) else None
    return next((key for key, _ in children(container) if str(key) == part), None)


def _add_dict(container: Container, part: str, command: _Command) -> Container:
    if command.action not in (_Action.ADD, _Action.SET_OR_ADD):
        raise _unknown_key(container, part, command)
    _insert(container, part, {}, command)
    added = child(container, _existing_key(container, part))
    assert isinstance(added, Container)
    return added


def _enter(node: Node) -> Container:
    """A node on the way to the key, if something can lie below it."""
    path = key_path(node)
    if node._is_interpolation():
        target = key_path(follow(node))
        raise ConfigError(f"{path} refers to {target} ({node._value()}); override that instead")
    if node._is_none():
        raise ConfigError(f"{path} is null, so nothing lies below it; set it to a dict first")
    if not isinstance(node, Container):
        value = node._value()
        raise ConfigError(
            f"{path} is {value!r} of type {type(value).__name__}, so nothing lies below it"
        )
    return node


def _unknown_key(container: Container, part: Any, command: _Command) -> ConfigError:
    if isinstance(container, ListConfig):
        return ConfigError(
            f"{key_path(container)} is a list with indices 0 to {len(container) - 1}; "
            f"there is no {part!r}"
        )
    missing = join_path(key_path(container), part)
    key = command.key if command.key.startswith(f"{missing}.") else missing
    root = container._get_root()
    assert isinstance(root, Container)
    how_to_add = "" if command.action is _Action.DELETE else f"; to add a key write +{key}=value"
    return ConfigError(f"there is no key {key}{did_you_mean_key(key, key_paths(root))}{how_to_add}")


# --- changing it ---------------------------------------------------------------------------


def _assign(container: Container, key: Any, value: Any, command: _Command) -> None:
    existing = _existing_key(container, str(key))
    if existing is None:
        if command.action is _Action.SET:
            raise _unknown_key(container, key, command)
        _insert(container, key, value, command)
        return
    node = child(container, existing)
    if command.action is _Action.ADD:
        raise ConfigError(f"{key_path(node)} exists; change it with key=value, without the +")
    if isinstance(value, dict) and isinstance(_current_value(node), dict):
        mapping = _enter(node)
        names = [str(name) for name, _ in children(mapping)]
        if names and not value:
            path = key_path(node)
            raise ConfigError(
                f"{path}={{}} would change nothing: a dict sets the keys that it names; delete a "
                f"key with ~{path}.{names[0]}"
            )
        for name, item in value.items():
            _assign(mapping, name, item, command)
    else:
        _replace(container, existing, value, command)


def _insert(container: Container, key: Any, value: Any, command: _Command) -> None:
    if isinstance(container, ListConfig):
        if str(key) != str(len(container)):
            raise ConfigError(
                f"{key_path(container)} has {len(container)} elements; the next one is "
                f"+{join_path(key_path(container), len(container))}=value"
            )
        container.append(to_node(value))
    else:
        container[key] = to_node(value)


def _replace(container: Container, key: Any, value: Any, command: _Command) -> None:
    """Set an existing key to a value that fits the type of the old one."""
    old = _current_value(child(container, key))
    path = key_path(child(container, key))
    container[key] = to_node(value)
    fitted = value if old is None else fit_value(path, old, plain(child(container, key)))
    if not _has_interpolation(value):
        container[key] = to_node(fitted)
    elif isinstance(value, list) and isinstance(fitted, tuple):
        new = child(container, key)
        assert isinstance(new, ListConfig)
        mark_tuple(new)


def _current_value(node: Node) -> Any:
    """The old value that decides on the type; None where there is none yet (null, ???, broken).

    A dict comes out empty: its keys are checked one by one.
    """
    try:
        target = follow(node)
    except ConfigError:
        return None
    if isinstance(target, ListConfig) and not target._is_none():
        items = [_current_value(item) for _, item in children(target)]
        return tuple(items) if is_tuple(target) else items
    return {} if isinstance(target, DictConfig) and not target._is_none() else target._value()


def _has_interpolation(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_interpolation, value))
    if isinstance(value, dict):
        return any(map(_has_interpolation, value.values()))
    return isinstance(value, str) and "${" in value


def _delete(container: Container, key: Any, command: _Command) -> None:
    if _existing_key(container, str(key)) is None:
        raise _unknown_key(container, key, command)
    node = child(container, key)
    if command.has_value and plain(node) != command.value:
        raise ConfigError(f"{key_path(node)} is {plain(node)!r}, so it was not deleted")
    del container[key]
