"""What a YAML config may hold and name.

A Python config is code and may name anything. A YAML config is data: it may name the classes and
functions that are listed here, and those of the packages that the caller of `LazyConfig.load`
allows. The place where the object was really defined decides, so a foreign object that is reached
through an attribute of an allowed module does not pass; and nothing is imported from elsewhere.
"""

from __future__ import annotations

import re
import reprlib
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .errors import ConfigError
from .nodes import plain, walk
from .targets import locate

# Whose classes may be named, wherever they are imported from. To make an object of one runs no code
# that its arguments bring, fetches nothing and writes nothing.
CLASSES = (
    "dn_detr.checkpoint.layouts",
    "dn_detr.data.coco",
    "dn_detr.data.transforms",
    "dn_detr.evaluation.coco",
    "dn_detr.layers",
    "dn_detr.modeling",
    "torch.nn.modules",
    "torch.optim",
    "torchvision.ops",
    "torchvision.transforms.v2",
)
FUNCTIONS = (
    "dn_detr.data.loaders.build_test_loader",
    "dn_detr.data.loaders.build_train_loader",
    "dn_detr.data.transforms.test_transforms",
    "dn_detr.data.transforms.train_transforms",
    "dn_detr.engine.optimizer.parameter_groups",
    "dn_detr.engine.schedule.cosine",
    "dn_detr.engine.schedule.multi_step",
)
TRUSTED = ("dn_detr.projects",)  # they come with the library, and are reviewed with it

_IMPORTED = ("dn_detr", "torch.nn", "torch.optim", "torchvision.ops", "torchvision.transforms")
_REFERENCE = re.compile(r"\$\{([^{}:]*)\}")
_ESCAPED = re.compile(r"(?<!\\)(\\\\)*\\\$\{")
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)
_MAX_KEY = 1000  # characters of a dotted key
_MAX_NAME = 200  # characters of a target
_MAX_BITS = 1024  # as those of a float
_MAX_SIZE = 2**17  # characters and values, each reference counted as what it refers to


def check_values(root: DictConfig, path: str | Path) -> None:
    """Check that a YAML config is plain data of a bounded size, before a reference is followed.

    Raises:
        ConfigError: a value calls a resolver, or is too large; names file and key.
    """
    data = plain(root)
    for key, value in walk(data):
        if len(key) > _MAX_KEY:
            raise ConfigError(f"{path}: {key[:50]}...: is a key of {len(key)} characters")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise ConfigError(f"{path}: {key}: is a number of {value.bit_length()} bits")
        if isinstance(value, str) and _RESOLVER.search(_without_references(value)):
            raise ConfigError(
                f"{path}: {key}: {reprlib.repr(value)} calls a resolver, which YAML may not; "
                "write the value"
            )
    try:
        is_large = _size(data) > _MAX_SIZE
    except RecursionError:
        is_large = True
    if is_large:
        raise ConfigError(f"{path}: its references (${{...}}) lead in a circle, or to too much")


def check_targets(root: DictConfig, path: str | Path, allow: Iterable[str]) -> None:
    """Check every target that a YAML config names.

    What is checked is what is built: interpolations can only lead to other parts of the config,
    because `check_values` refuses resolvers, and computed targets are refused here.

    Args:
        root: the config, overrides applied.
        path: its file, for messages.
        allow: packages whose classes and functions it may name, too.

    Raises:
        ConfigError: a target is not allowed or does not exist; names file and key.
    """
    packages = (*TRUSTED, *allow)
    for key, value in walk(plain(root)):
        if key.rpartition(".")[2] != "_target_":
            continue
        if not isinstance(value, str) or "${" in value:
            raise ConfigError(
                f"{path}: {key}: must be a dotted name, which YAML may not compute: "
                f"{reprlib.repr(value)}"
            )
        try:
            _check_target(value, packages)
        except ConfigError as error:
            raise ConfigError(f"{path}: {key}: {error}") from error


def _check_target(name: str, packages: tuple[str, ...]) -> None:
    if len(name) > _MAX_NAME or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{reprlib.repr(name)} is no dotted name; YAML may not name it")
    if not _is_inside(name, (*_IMPORTED, *packages)) or "._" in name:
        raise _forbidden(name, name, packages)
    found: Any = locate(name)
    if isinstance(found, types.FunctionType) and found.__qualname__ != found.__name__:
        # Called with a `self` of the file's choice it could do what no constructor does.
        raise ConfigError(f"{name} is a method without its object; YAML may not name it")
    if not isinstance(
        found, (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
    ):
        raise ConfigError(f"{name} is neither a class nor a function; YAML may not name it")
    home = str(found.__module__)
    is_listed = (
        _is_inside(home, CLASSES)
        if isinstance(found, type)
        else f"{home}.{found.__qualname__}" in FUNCTIONS
    )
    if not (is_listed or _is_inside(home, packages)):
        raise _forbidden(name, home, packages)


def _without_references(text: str) -> str:
    """A text without `${key}`, also nested; what is left of `${name:...}` calls a resolver."""
    while _REFERENCE.search(text):
        text = _REFERENCE.sub("", text)  # from the inside out
    return text


def _size(data: Any) -> int:
    """How large a config becomes when references are replaced by what they refer to.

    A value in which a part of a reference is computed counts as all that it may lead to.
    """
    known: dict[tuple[Any, ...], int] = {}

    def at(path: tuple[Any, ...]) -> int:
        """Number of characters, values and indices of what a path leads to."""
        value = data
        for depth, part in enumerate(path):
            if isinstance(value, str):  # a reference on the way, which leads on
                path = path[:depth]
                break
            value = _item(value, part)
        if path not in known:
            known[path] = _MAX_SIZE + 1  # for a reference to what it lies in
            known[path] = 1 + sum(parts(value, path))
        return known[path]

    def parts(value: Any, path: tuple[Any, ...]) -> Iterator[int]:
        if isinstance(value, (dict, list)):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield len(str(key)) + at((*path, key))
        elif isinstance(value, str):
            yield len(value)
            value = _ESCAPED.sub("", value)
            while found := _REFERENCE.search(value):
                reference = found[1].strip().partition("*")[0]
                names = re.findall(r"[^.\[\]'\"\s]+", reference)
                dots = len(reference) - len(reference.lstrip("."))
                start = path[: len(path) - dots] if dots else ()
                yield value.count(found[0]) * at((*start, *names))
                value = value.replace(found[0], "*")

    return at(())


def _item(value: Any, key: Any) -> Any:
    """What OmegaConf finds, which reads an index as Python reads a number; None if nothing."""
    if isinstance(value, dict):
        return value.get(key)
    with suppress(ValueError):
        return value[int(key)] if isinstance(value, list) and 0 <= int(key) < len(value) else None
    return None


def _is_inside(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _forbidden(name: str, home: str, packages: Iterable[str]) -> ConfigError:
    library = name.partition(".")[0]
    if library in sys.stdlib_module_names or _is_inside(
        library, ("dn_detr", "torch", "torchvision")
    ):
        # What is not listed is so on purpose.
        remedy = "it may name what docs/security.md lists; a Python config may name anything"
    elif _is_inside(name, packages):
        remedy = f"only what is defined in {library} itself is trusted with it"
    else:
        remedy = (
            f"if you trust {library}, add --trust {library} to the command, or in Python "
            f"trust=[{library!r}] to dn_detr.load(...), allow=[{library!r}] to LazyConfig.load(...)"
        )
    return ConfigError(f"a YAML config may not name {name} (defined in {home}); {remedy}")
