"""Dotted names of callables: naming, finding, and what a data-only config may find.

A Python config is code and may name anything. A YAML config is data: it may name classes and
functions that are defined inside `DATA_PACKAGES` or inside the packages that the caller of
`LazyConfig.load` allows. The place where the object was really defined decides, so a foreign object
that is reached through an attribute of an allowed module does not pass; and nothing is imported
from a library that has no allowed package.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from omegaconf import Container, Node

from .errors import ConfigError
from .nodes import children

# Not here: what takes a config, overrides, or a path or address to load code from and acts on it,
# since data would then be run as code after all: dn_detr.config, the training loop, torch.hub, and
# torchvision.models, whose weights are fetched and unpickled.
DATA_PACKAGES = (
    "dn_detr.data",
    "dn_detr.engine.optimizer",
    "dn_detr.engine.schedule",
    "dn_detr.evaluation",
    "dn_detr.layers",
    "dn_detr.modeling",
    "dn_detr.ops",
    "dn_detr.structures",
    "torch.nn",
    "torch.optim",
    "torch._C._nn",  # where functions of torch.nn.functional such as gelu are defined
    "torchvision.ops",
    "torchvision.transforms",
)
_DATA_FLAG = "data_only"


def dotted_name(target: Any) -> str | None:
    """The name under which another process finds an object again.

    Args:
        target: a class, a function, or a class method.

    Returns:
        `package.module.Qualified.name`, or None for lambdas, local functions, objects of
        `__main__` or of a config file, and instances.
    """
    owner = getattr(target, "__self__", None)
    if inspect.ismethod(target) and isinstance(owner, type):
        name = f"{owner.__module__}.{owner.__qualname__}.{target.__name__}"
    else:
        module = getattr(target, "__module__", None)
        qualname = getattr(target, "__qualname__", None)
        name = f"{module}.{qualname}"
        if not isinstance(module, str) or not isinstance(qualname, str) or module == "__main__":
            return None
    try:
        return name if locate(name) == target else None
    except ConfigError:
        return None


def locate(name: str) -> Any:
    """Import the object that a dotted name stands for.

    Args:
        name: `package.module.Class` or `package.module.Class.method`.

    Returns:
        The object.

    Raises:
        ConfigError: there is no such module or attribute. An exception inside an imported
            module passes through.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{name!r} is not the dotted name of an importable object")
    found, rest = _import_longest(parts)
    for part in rest:
        if not hasattr(found, part):
            raise ConfigError(f"{name!r} cannot be imported: {found!r} has no attribute {part!r}")
        found = getattr(found, part)
    return found


def _import_longest(parts: list[str]) -> tuple[types.ModuleType, list[str]]:
    module: types.ModuleType | None = None
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if module is not None and not hasattr(module, "__path__"):
            return module, parts[count - 1 :]
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            if module is None:
                raise ConfigError(f"{'.'.join(parts)!r}: there is no module {name!r}") from error
            return module, parts[count - 1 :]
    assert module is not None
    return module, []


def mark_data(root: Container, allow: Iterable[str]) -> None:
    """Mark a config and every node in it as data, which may name allow-listed targets only.

    Every node carries the mark, so it stays when a part is moved into another config.
    """
    flags = [_DATA_FLAG, *(f"allow:{package}" for package in allow)]
    for node in _walk(root):
        node._set_flag(flags, True)


def _walk(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, Container):
        for _, item in children(node):
            yield from _walk(item)


def is_data(node: Node) -> bool:
    """Whether a node came from a data-only (YAML) config."""
    return bool(node._get_flag(_DATA_FLAG))


def locate_data(name: str, source: Node) -> Any:
    """`locate` for a target named by a data-only config.

    Args:
        name: dotted name.
        source: a node of that config; it knows the packages that the caller allowed.

    Returns:
        A class, function or class method that is defined in an allowed package.

    Raises:
        ConfigError: the target is not allowed, or does not exist.
    """
    library = name.partition(".")[0]
    is_known = any(package.partition(".")[0] == library for package in DATA_PACKAGES)
    if not (is_known or _is_allowed(name, source)) or "._" in name:
        raise _forbidden(name, name)
    found = locate(name)
    if isinstance(found, types.MethodType):
        home = found.__func__.__module__
    elif isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType)):
        home = found.__module__
    else:
        raise ConfigError(f"{name} is neither a class nor a function; YAML may not name it")
    if isinstance(found, types.FunctionType) and found.__qualname__ != found.__name__:
        # Called with a `self` of the file's choice it could do what no constructor does.
        raise ConfigError(f"{name} is a method without its object; YAML may not name it")
    if not _is_allowed(str(home), source):
        raise _forbidden(name, str(home))
    return found


def _forbidden(name: str, home: str) -> ConfigError:
    return ConfigError(
        f"a YAML config may not instantiate {name} (defined in {home}): it may name classes "
        f"and functions of {', '.join(DATA_PACKAGES)} only; if you trust the file, load it "
        f"with LazyConfig.load(path, allow=({home.partition('.')[0]!r},))"
    )


def _is_allowed(name: str, source: Node) -> bool:
    parts = name.split(".")
    packages = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(
        package in DATA_PACKAGES or source._get_flag(f"allow:{package}") for package in packages
    )


def signature_text(target: Callable[..., Any]) -> str:
    """Parameters of a callable as written in its signature, "(...)" where it has none."""
    signature = _signature(target)
    if signature is None:
        return "(...)"
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))


def parameter_names(target: Callable[..., Any]) -> list[str] | None:
    """Names that a callable takes by keyword; None when it takes any, or has no signature."""
    signature = _signature(target)
    if signature is None:
        return None
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in keyword]


def binding_error(
    target: Callable[..., Any], arguments: dict[str, Any], *, partial: bool
) -> str | None:
    """What is wrong with the names of a call's arguments; None when they fit the signature."""
    signature = _signature(target)
    if signature is None:
        return None
    try:
        (signature.bind_partial if partial else signature.bind)(**arguments)
    except TypeError as error:
        return str(error)
    return None


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # some builtins have none
        return None
