"""Run a Python config file and collect its public data.

A config imports its neighbours by file path (`from .models.x import model`), without packages.
Each config file gets its own run of every file that it imports, so that changing an imported node
never reaches another config. The import rule lives in the private `__builtins__` of the executed
file; the interpreter's own import is never replaced, so nothing has to be restored.
"""

from __future__ import annotations

import ast
import builtins
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig

from .errors import ConfigError, did_you_mean
from .nodes import to_node

_PLAIN_DATA = (dict, list, tuple, str, int, float, bool, type(None))


def read_python(path: Path) -> dict[str, Any]:
    """Run a config file and return its public data.

    Kept are names without a leading underscore that hold a config node or plain data (dict,
    list, tuple, str, int, float, bool, None). Left out are modules, functions, classes and other
    objects, and plain data that came from an absolute import (`from math import pi`).

    Args:
        path: an existing .py file.

    Returns:
        Values by name, in the order of their definition.

    Raises:
        ConfigError: syntax error, or an exception while the file ran; names file and line.
    """
    tree = _parse(path)
    namespace = _run(path, compile(tree, str(path), "exec", dont_inherit=True), importers=())
    foreign = _absolute_imports(tree)
    return {
        name: value
        for name, value in vars(namespace).items()
        if not name.startswith("_") and _is_data(value, foreign=name in foreign)
    }


def _is_data(value: Any, *, foreign: bool) -> bool:
    if isinstance(value, (DictConfig, ListConfig)):
        return True
    return isinstance(value, _PLAIN_DATA) and not foreign


def _absolute_imports(tree: ast.Module) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        text = f": {error.text.strip()!r}" if error.text else ""
        place = f"{path}, line {error.lineno}"
        raise ConfigError(f"{place}: syntax error: {error.msg}{text}") from error
    except ValueError as error:  # null bytes
        raise ConfigError(f"{path}: is not Python: {error}") from error


def _run(path: Path, code: CodeType, importers: tuple[Path, ...]) -> ModuleType:
    if path.resolve() in importers:
        cycle = " -> ".join(file.name for file in (*importers, path))
        raise ConfigError(f"{path}: imports itself: {cycle}")
    module = ModuleType(f"config_file.{path.stem}")
    module.__file__ = str(path)
    finder = _NeighbourImport(path, (*importers, path.resolve()))
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": finder}
    try:
        exec(code, module.__dict__)
    except Exception as error:
        raise ConfigError(f"{path}, line {_line_in(path, error)}: {_reason(error)}") from error
    return module


def _line_in(path: Path, error: Exception) -> int:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno or 0 for frame in frames if frame.filename == str(path)][-1]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def _make_nodes(module: ModuleType) -> None:
    """Turn the plain dicts of an imported config into nodes, so that `train.epochs = 12` works."""
    for name, value in list(vars(module).items()):
        if isinstance(value, dict) and not name.startswith("_"):
            setattr(module, name, to_node(value))


class _NeighbourImport:
    """The `__import__` of one config file: relative imports run neighbouring files."""

    def __init__(self, path: Path, importers: tuple[Path, ...]) -> None:
        self._path = path
        self._importers = importers
        self._modules: dict[Path, ModuleType] = {}  # two imports of a file share one run of it

    def __call__(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        folder = self._path.resolve().parents[level - 1]
        target = folder.joinpath(*name.split(".")) if name else folder
        if name and target.with_suffix(".py").is_file():
            return self._load(target.with_suffix(".py"))
        return self._load_folder(target, fromlist or ())

    def _load(self, path: Path) -> ModuleType:
        if path not in self._modules:
            code = compile(_parse(path), str(path), "exec", dont_inherit=True)
            self._modules[path] = _run(path, code, self._importers)
            _make_nodes(self._modules[path])
        return self._modules[path]

    def _load_folder(self, folder: Path, names: Sequence[str]) -> ModuleType:
        """`from .models import a, b`: a namespace of the files a.py and b.py."""
        namespace = ModuleType(f"config_file.{folder.name}")
        for name in names:
            path = folder / f"{name}.py"
            if not path.is_file():
                near = did_you_mean(name, [file.stem for file in folder.glob("*.py")])
                missing = path if folder.is_dir() else folder.with_suffix(".py")
                raise ConfigError(f"relative import: there is no file {missing}{near}")
            setattr(namespace, name, self._load(path))
        return namespace
