"""YAML of configs: a safe reader and the writer that it reads back.

Differences from PyYAML's safe schema: `1e-4` is a float, dates stay text, `!tuple [..]` is a
tuple, and a key written twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError
from .nodes import to_node

_TUPLE_TAG = "!tuple"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Reader(yaml.SafeLoader):
    """Safe loader of configs."""


class _Writer(yaml.SafeDumper):
    """Safe dumper of configs."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _without_float_and_date(resolvers: dict[str, list[Any]]) -> dict[str, list[Any]]:
    replaced = (_FLOAT_TAG, "tag:yaml.org,2002:timestamp")
    return {
        first: [(tag, pattern) for tag, pattern in entries if tag not in replaced]
        for first, entries in resolvers.items()
    }


for _schema in (_Reader, _Writer):
    _schema.yaml_implicit_resolvers = _without_float_and_date(_schema.yaml_implicit_resolvers)
    _schema.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def _construct_mapping(reader: _Reader, node: yaml.MappingNode) -> dict[Any, Any]:
    written: set[tuple[str, str]] = set()
    for key, _ in node.value:
        name = (key.tag, str(key.value))
        if name in written:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key.value!r} is written twice", key.start_mark
            )
        written.add(name)
    return reader.construct_mapping(node, deep=True)


def _construct_tuple(reader: _Reader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(reader.construct_sequence(node, deep=True))


def _represent_text(writer: _Writer, text: str) -> yaml.Node:
    # PyYAML writes these line breaks unescaped, and reads them back as a space.
    breaks = any(character in text for character in "\x85\u2028\u2029")
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


def _represent_list(writer: _Writer, items: list[Any]) -> yaml.Node:
    return _represent_items(writer, "tag:yaml.org,2002:seq", items)


def _represent_tuple(writer: _Writer, items: tuple[Any, ...]) -> yaml.Node:
    return _represent_items(writer, _TUPLE_TAG, items)


def _represent_items(writer: _Writer, tag: str, items: Any) -> yaml.Node:
    on_one_line = not any(isinstance(item, (dict, list, tuple)) for item in items)
    return writer.represent_sequence(tag, items, flow_style=on_one_line)


_Reader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Reader.add_constructor(_TUPLE_TAG, _construct_tuple)
_Writer.add_representer(str, _represent_text)
_Writer.add_representer(list, _represent_list)
_Writer.add_representer(tuple, _represent_tuple)


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML config; no code runs.

    Args:
        path: an existing file whose top level is a mapping.

    Returns:
        The root of the config.

    Raises:
        ConfigError: the file is not YAML, has tags other than `!tuple`, a doubled key, or a top
            level that is no mapping; names file and line.
    """
    try:
        with path.open("rb") as file:
            data = yaml.load(file, Loader=_Reader)
        root = to_node(data)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not a valid YAML config: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deep") from error
    if not isinstance(root, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping, not {type(data).__name__}")
    return root


def write_yaml(data: dict[Any, Any]) -> str:
    """Write plain data (dict, list, tuple, str, int, float, bool, None) as YAML text."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100)
