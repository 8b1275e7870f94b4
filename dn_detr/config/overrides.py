"""Apply command-line overrides in hydra's grammar to a config, strictly.

The rules are listed in docs/configs.md. hydra's parser reads the tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, did_you_mean_key
from .nodes import join_path, key_path, plain, to_node, value_of, walk
from .value_types import fit_value
from .yaml_file import MAX_DEPTH


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """See `LazyConfig.apply_overrides`."""
    changed = copy.deepcopy(cfg)
    parser = OverridesParser.create()
    for token in overrides:
        try:
            _Edit(changed, _parse(parser, token)).apply()
        except OmegaConfBaseException as error:  # from a node with a type of its own
            reason = str(error).splitlines()[0]
            raise ConfigError(f"override {token!r}: {reason} ({error.full_key})") from error
        except ConfigError as error:
            raise ConfigError(f"override {token!r}: {error}") from error
    return changed


def _parse(parser: OverridesParser, token: str) -> Override:
    if token.startswith("-"):
        raise ConfigError("looks like an option, but there is none so named")
    try:
        token.encode()  # a config that holds half a character could not be saved
        override = parser.parse_override(token)
        levels = [path.count(".") for path, _ in walk({override.key_or_group: override.value()})]
        if max(levels) >= MAX_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise ConfigError(f"is nested deeper than {MAX_DEPTH} levels") from error
    except (HydraException, ValueError) as error:  # the latter of a number of 5000 digits
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{_syntax_remedy(token)} ({reason})") from error
    key = override.key_or_group
    if override.package is not None or "/" in key or not key:
        raise ConfigError("write key=value with a key such as train.seed")
    if override.type is OverrideType.FORCE_ADD:
        raise ConfigError(f"write {key}=value to change a key, +{key}=value to add one")
    if override.is_sweep_override():
        raise ConfigError(
            "is a sweep over several values, which cannot be trained together; "
            f"a list is {key}=[1,2], a text with a comma needs quotes"
        )
    if override.type is OverrideType.DEL and override.value_type is not None:
        raise ConfigError(f"write ~{key} to delete a key, without a value")
    unquoted = re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", token.partition("=")[2])
    if "None" in re.split(r"[\[\]{},:\s]+", unquoted):
        raise ConfigError(
            "None is the text 'None' here; write null for no value, or 'None' "
            "in quotes for the text"
        )
    return override


def _syntax_remedy(token: str) -> str:
    key, equals, value = token.partition("=")
    if not equals:
        return "write key=value, or ~key to delete a key"
    if "[" in key:
        return "write a list index as a part of the key: list.0=value"
    if value.startswith("("):
        return f"write a list, {key}=[1,2]"
    quote = '"' if "'" in value else "'"
    shell_quote = "'" if quote == '"' else '"'
    text = value.strip("'\"")
    return (
        "quote a value with special characters, for hydra and again for the shell: "
        f"{shell_quote}{key}={quote}{text}{quote}{shell_quote}"
    )


class _Edit:
    """One override on its way into a config."""

    def __init__(self, root: DictConfig, override: Override) -> None:
        self.root = root
        self.key = override.key_or_group
        self.value = override.value()
        self.adds = override.type is OverrideType.ADD
        self.deletes = override.type is OverrideType.DEL

    def apply(self) -> None:
        *outer, last = self.key.split(".")
        container: Container = self.root
        path = ""
        for part in outer:
            key = _existing_key(container, part)
            if key is None and self.adds and _takes_new_keys(container):
                container[part] = {}
                key = part
            if key is None:
                raise self._unknown_key(container, part, path)
            path = join_path(path, part)
            container = _enter(container, key, path)
        if self.deletes:
            key = _existing_key(container, last)
            if key is None:
                raise self._unknown_key(container, last, path)
            del container[key]
        else:
            self._assign(container, last, self.value, path)

    def _assign(self, container: Container, part: str, value: Any, outer_path: str) -> None:
        key = _existing_key(container, part)
        path = join_path(outer_path, part)
        if key is None:
            if not self.adds or not _takes_new_keys(container):
                raise self._unknown_key(container, part, outer_path)
            container[part] = to_node(value)
            return
        if self.adds:
            raise ConfigError(f"{path} exists; change it with key=value, without the +")
        old = _type_example(container, key)
        if not (isinstance(value, dict) and isinstance(old, dict)):
            if _has_reference(value):  # it has the type of what it refers to
                container[key] = to_node(value)
                value = _plain_value(container, key, path)
                fit_value(path, old, value)
            else:
                container[key] = to_node(fit_value(path, old, value))
            return
        mapping = _enter(container, key, path)
        assert isinstance(mapping, DictConfig)
        if not value and mapping:
            raise ConfigError(
                f"{path}={{}} would change nothing: a dict sets the keys that it names; delete a "
                f"key with ~{path}.{next(iter(mapping))!s}"
            )
        for name, item in value.items():
            self._assign(mapping, str(name), item, path)

    def _unknown_key(self, container: Container, part: str, path: str) -> ConfigError:
        if isinstance(container, ListConfig):
            return ConfigError(
                f"{path} is a list with indices 0 to {len(container) - 1}; there is no {part!r}"
            )
        missing = join_path(path, part)
        key = self.key if self.key.startswith(f"{missing}.") else missing
        near = did_you_mean_key(key, [known for known, _ in walk(plain(self.root))])
        can_add = not self.deletes and _takes_new_keys(container)
        how_to_add = f"; to add a key write +{key}=value" if can_add else ""
        return ConfigError(f"there is no key {key}{near}{how_to_add}")


def _takes_new_keys(container: Container) -> bool:
    """Whether it is a dict whose keys no dataclass decides."""
    return isinstance(container, DictConfig) and not is_dataclass(OmegaConf.get_type(container))


def _existing_key(container: Container, part: str) -> Any:
    """The key or index that a part of a dotted key names; None when there is none."""
    if isinstance(container, ListConfig):
        index = int(part) if part.isdecimal() else len(container)
        return index if index < len(container) else None
    assert isinstance(container, DictConfig)
    return next((key for key in container if str(key) == part), None)


def _enter(container: Container, key: Any, path: str) -> Container:
    """The container on the way to a key, if something can lie below it."""
    if OmegaConf.is_interpolation(container, key):
        text = plain(container)[key]
        found = value_of(container, key, path)
        target = key_path(found) if isinstance(found, Container) else text
        raise ConfigError(f"{path} refers to {target} ({text}); override that instead")
    value = value_of(container, key, path)
    if value is None:
        raise ConfigError(f"{path} is null, so nothing lies below it; set it to a dict first")
    if not isinstance(value, Container):
        raise ConfigError(
            f"{path} is {value!r} of type {type(value).__name__}, so nothing lies below it"
        )
    return value


def _type_example(container: Container, key: Any) -> Any:
    """The old value that decides on the type; None where there is none yet (null, ???, broken).

    A dict comes out empty: its keys are checked one by one.
    """
    try:
        value = value_of(container, key, "")
    except ConfigError:
        return None
    if isinstance(value, ListConfig):
        return [_type_example(value, index) for index in range(len(value))]
    return {} if isinstance(value, DictConfig) else value


def _plain_value(container: Container, key: Any, path: str) -> Any:
    value = value_of(container, key, path)
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value


def _has_reference(value: Any) -> bool:
    texts = [value, *(item for _, item in walk(value))]
    return any(isinstance(text, str) and "${" in text for text in texts)
