"""What a YAML config may name.

A Python config is code and may name anything. A YAML config is data: it may name classes and
functions that are defined inside `DATA_PACKAGES` or inside the packages that the caller of
`LazyConfig.load` allows. The place where the object was really defined decides, so a foreign object
that is reached through an attribute of an allowed module does not pass; and nothing is imported
from a library that has no allowed package.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .errors import ConfigError
from .nodes import plain, walk
from .targets import locate

# Not here: what takes a config, overrides, or a path or address to load code from and acts on it,
# since data would then be run as code after all: dn_detr.config, the training loop, torch.hub, and
# torchvision.models, whose weights are fetched and unpickled.
DATA_PACKAGES = (
    "dn_detr.checkpoint.layouts",  # names of tensors; no files
    "dn_detr.data",
    "dn_detr.engine.optimizer",
    "dn_detr.engine.schedule",
    "dn_detr.evaluation",
    "dn_detr.layers",
    "dn_detr.modeling",
    "dn_detr.ops",
    "dn_detr.projects",  # they come with the library, and are reviewed with it
    "dn_detr.structures",
    "torch.nn",
    "torch.optim",
    "torch._C._nn",  # where functions of torch.nn.functional such as gelu are defined
    "torchvision.ops",
    "torchvision.transforms",
)
_ESCAPED = re.compile(r"(?<!\\)(\\\\)*\\\$\{")
_REFERENCE = re.compile(r"\$\{[^{}:]*\}")


def check_data(root: DictConfig, path: str | Path, allow: Iterable[str]) -> None:
    """Check every target that a YAML config names.

    What is checked is what is built: interpolations can only lead to other parts of the config,
    because resolvers and interpolated targets are refused.

    Args:
        root: the config, overrides applied.
        path: its file, for messages.
        allow: packages that it may name besides `DATA_PACKAGES`.

    Raises:
        ConfigError: a target is not allowed or does not exist; names file and key.
    """
    packages = (*DATA_PACKAGES, *allow)
    for key, value in walk(plain(root)):
        if isinstance(value, str) and _calls_resolver(value):
            raise ConfigError(
                f"{path}: {key}: {value!r} calls a resolver, which YAML may not; write the value"
            )
        if key.rpartition(".")[2] != "_target_":
            continue
        if not isinstance(value, str) or "${" in value:
            raise ConfigError(
                f"{path}: {key}: must be a dotted name, which YAML may not compute: {value!r}"
            )
        try:
            _check_target(value, packages)
        except ConfigError as error:
            raise ConfigError(f"{path}: {key}: {error}") from error
        except Exception as error:  # the imported module may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}: {key}: importing {value} failed: {reason}") from error


def _check_target(name: str, packages: tuple[str, ...]) -> None:
    library = name.partition(".")[0]
    if not (_is_known(library) or _is_inside(name, packages)) or "._" in name:
        raise _forbidden(name, name)
    found: Any = locate(name)
    if isinstance(found, types.MethodType):
        home = found.__func__.__module__
    elif isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType)):
        home = found.__module__
    else:
        raise ConfigError(f"{name} is neither a class nor a function; YAML may not name it")
    if isinstance(found, types.FunctionType) and found.__qualname__ != found.__name__:
        # Called with a `self` of the file's choice it could do what no constructor does.
        raise ConfigError(f"{name} is a method without its object; YAML may not name it")
    if not _is_inside(str(home), packages):
        raise _forbidden(name, str(home))


def _is_known(library: str) -> bool:
    return any(package.partition(".")[0] == library for package in DATA_PACKAGES)


def _calls_resolver(text: str) -> bool:
    """Whether a text has `${name:...}`, which could make new nodes after the check."""
    text = _ESCAPED.sub("", text)
    while _REFERENCE.search(text):
        text = _REFERENCE.sub("", text)  # from the inside out
    return "${" in text


def _is_inside(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _forbidden(name: str, home: str) -> ConfigError:
    package = home.partition(".")[0]
    if _is_known(package):  # what is missing there is missing on purpose
        remedy = "it may name what docs/configs.md lists; a Python config may name anything"
    else:
        remedy = (
            f"if you trust {package}, add --trust {package} to the command, or in Python "
            f"trust=[{package!r}] to dn_detr.load(...), allow=[{package!r}] to LazyConfig.load(...)"
        )
    return ConfigError(f"a YAML config may not name {name} (defined in {home}); {remedy}")
