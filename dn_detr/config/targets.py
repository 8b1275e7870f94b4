"""Dotted names of callables: naming them, and finding them again."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

from .errors import ConfigError


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
        ConfigError: there is no such module or attribute, or the module raised an exception.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{name!r} is not the dotted name of an importable object")
    try:
        found, rest = _import_longest(parts)
    except ConfigError:
        raise
    except Exception as error:  # the imported module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"importing {name} failed: {reason}") from error
    for part in rest:
        if not hasattr(found, part):
            raise ConfigError(f"{name!r} cannot be imported: {found!r} has no attribute {part!r}")
        found = getattr(found, part)
    return found


def _import_longest(parts: list[str]) -> tuple[Any, list[str]]:
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
    return module, []
