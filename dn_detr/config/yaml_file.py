"""YAML of configs, read and written by OmegaConf.

OmegaConf reads `1e-4` as a float and a date as text. What could grow beyond the size of its file is
refused before.
"""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError
from .lazy_call import LazyCall
from .nodes import join_path, plain, to_node, walk
from .targets import dotted_name

_MAX_BYTES = 2**17  # a saved config of the zoo has 2**13
MAX_DEPTH = 50
_MAX_TEXT = 4096  # characters of a key or value, as of a path
_MAX_REFERENCES, _MAX_COUNT = 1000, 5000  # OmegaConf takes milliseconds for each


def read_yaml(source: Path | str, name: str | Path) -> DictConfig:
    """Read a YAML config, whose top level is a mapping; no code runs.

    Args:
        source: an existing file, or its text.
        name: of the file, for messages.

    Returns:
        The root of the config.

    Raises:
        ConfigError: the file is not YAML, is too large or nested too deep, has tags, aliases, a key
            that is written twice, or a top level that is no mapping; names the file.
    """
    try:
        text = source if isinstance(source, str) else _read_text(source)
        scalars = _count_scalars(text)
        data = OmegaConf.load(StringIO(text))
        if not isinstance(data, DictConfig):
            raise ValueError("the top level must be a mapping, not a list")
        if scalars > sum(2 - isinstance(value, (dict, list)) for _, value in walk(plain(data))):
            raise ValueError("a key is written twice (1, 0x1 and true are one key), or is <<")
        root: DictConfig = to_node(plain(data))
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        OSError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{name}: is not a valid YAML config: {error}") from error
    return root


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES + 1).decode()


def _count_scalars(text: str) -> int:
    """Number of keys and values of a YAML text, before anything is made of it.

    Raises:
        ValueError: it is too large or nested too deep, or has a tag or an alias.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
    count = depth = references = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"it has an alias, *{event.anchor}; refer to a key by ${{key}} instead"
            )
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"it has a tag, {event.tag}; a config is plain data")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            count += 1
            references += event.value.count("${")
            if (size := len(event.value.encode())) > _MAX_TEXT:  # half a character is an error
                raise ValueError(f"it has a value of {size} characters")
        if references > _MAX_REFERENCES or count > _MAX_COUNT:
            raise ValueError(
                f"it has more than {_MAX_COUNT} keys and values, or {_MAX_REFERENCES} ${{...}}"
            )
    return count


def write_yaml(cfg: Container, *, resolve: bool) -> str:
    """Write a config as YAML that `read_yaml` reads back.

    Args:
        cfg: root of a config, or a part of one.
        resolve: replace interpolations by their values; a mandatory value `???` stays.

    Returns:
        The text; callables are written by their dotted names.

    Raises:
        ConfigError: a value has no form in YAML, or an interpolation is broken or circular;
            names the key.
    """
    return OmegaConf.to_yaml(OmegaConf.create(_convert(_contents(cfg, resolve), resolve)))


def _contents(cfg: Container, resolve: bool) -> Any:
    """Dicts, lists and leaves of a config; nodes that were made from a dataclass stay nodes."""
    try:
        return OmegaConf.to_container(
            cfg, resolve=resolve, structured_config_mode=SCMode.DICT_CONFIG
        )
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key}: cannot resolve the interpolation: {reason}"
        ) from error
    except RecursionError as error:
        raise ConfigError("an interpolation refers to a node that contains it") from error


def _convert(value: Any, resolve: bool, path: str = "", *, is_argument: bool = False) -> Any:
    if isinstance(value, DictConfig):
        kind = OmegaConf.get_type(value)
        assert kind is not None and is_dataclass(kind)
        fields = OmegaConf.to_container(value, resolve=resolve)
        assert isinstance(fields, dict)
        value = {"_target_": dotted_name(kind), **fields} if is_argument else fields
    if isinstance(value, dict):
        is_call = is_argument or "_target_" in value
        items = {
            key: _convert(item, resolve, join_path(path, key), is_argument=is_call)
            for key, item in value.items()
        }
        if isinstance(items.get("_target_"), dict):  # a callable was stored as an object
            items["_target_"] = items["_target_"]["_target_"]
        return items
    if isinstance(value, (list, tuple)):
        return [
            _convert(item, resolve, join_path(path, index), is_argument=is_argument)
            for index, item in enumerate(value)
        ]
    if isinstance(value, str):
        if any(line_break in value for line_break in "\x85\u2028\u2029"):
            raise ConfigError(f"{path}: {value!r} has a line break that YAML does not keep")
        # Text that reads as an interpolation when all are resolved was written escaped.
        escape = re.compile(r"(\\*)\$\{")
        return escape.sub(lambda match: f"{match[1] * 2}\\${{", value) if resolve else str(value)
    for kind in (bool, int, float):  # also their subclasses, such as numpy.float64
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else _name(value, path)


def _name(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, LazyCall):
        raise ConfigError(f"{path}: {value!r} is not called: write {value!r}()")
    name = dotted_name(value)
    if name is not None:
        return {"_target_": name, "_partial_": True}
    if hasattr(value, "__qualname__") or isinstance(value, partial):
        raise ConfigError(
            f"{path}: {value!r} cannot be written to YAML because it cannot be imported by a "
            "name; use a named function or class of an importable module: a file beside a config "
            "is one if its folder is a package, with a file __init__.py in it"
        )
    kind = type(value).__name__
    raise ConfigError(
        f"{path}: an object of type {kind} cannot be written to YAML; use a LazyCall that makes "
        f"it, L({kind})(...), or plain data (a str for a path or a dtype)"
    )
