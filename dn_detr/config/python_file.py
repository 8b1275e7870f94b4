"""Run a Python config file and collect its public data.

Each config file gets its own run of every config file that it imports, so that changing an imported
node never reaches another config. Which files are configs: those that lie in no package, and those
of a package's folder `configs`. All other files of a package are modules, and are imported as
always. The import rule lives in the private `__builtins__` of the executed file; the interpreter's
own import is never replaced, so nothing has to be restored.
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
from omegaconf.errors import ConfigAttributeError

from .errors import ConfigError, did_you_mean
from .nodes import to_node
from .packages import configs_folder, make_importable, module_name

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
    make_importable(path)
    namespace = _run(path, compile(tree, str(path), "exec", dont_inherit=True), importers=())
    foreign = _absolute_imports(tree, path)
    return {
        name: value
        for name, value in vars(namespace).items()
        if not name.startswith("_") and _is_data(value, foreign=name in foreign)
    }


def _is_data(value: Any, *, foreign: bool) -> bool:
    if isinstance(value, (DictConfig, ListConfig)):
        return True
    return isinstance(value, _PLAIN_DATA) and not foreign


def _absolute_imports(tree: ast.Module, path: Path) -> set[str]:
    """Names that a file has from modules; those from other configs are data of the config."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        if configs_folder(node.module or "", path) is None
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
    finder = _ConfigImport(path, (*importers, path.resolve()))
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": finder}
    try:
        exec(code, module.__dict__)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)][-1]
        reason = str(error)
        if not isinstance(error, ConfigError):
            texts = [text.strip() for text in reason.splitlines() if "_type=" not in text]
            reason = f"{type(error).__name__}: {' '.join(texts)}"
        if isinstance(error, ConfigAttributeError) and error.parent_node is not None:
            reason += did_you_mean(str(error.key), map(str, error.parent_node))
        raise ConfigError(f"{path}, line {line}: {reason}") from error
    return module


class _ConfigImport:
    """The `__import__` of one config file: it runs other config files, and imports modules."""

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
        names = fromlist or ()
        if level > 0:
            folder = self._path.resolve().parents[level - 1]
            target = folder.joinpath(*name.split(".")) if name else folder
        elif names and (found := configs_folder(name, self._path)) is not None:
            target = found
        else:
            return builtins.__import__(name, globals, locals, names, level)
        module = module_name(target)
        if module is not None:
            return self._import_module(module, target, names)
        file = target.with_suffix(".py")
        return self._load(file) if file.is_file() else self._load_folder(target, names)

    def _import_module(self, name: str, target: Path, names: Sequence[str]) -> ModuleType:
        """Import a module of the package that the config belongs to."""
        if not target.is_dir() and not target.with_suffix(".py").is_file():
            raise ConfigError(f"relative import: there is no module {target}.py")
        module = builtins.__import__(name, fromlist=names or ("*",))
        found = getattr(module, "__file__", None) or next(iter(module.__path__))
        if not Path(found).resolve().is_relative_to(target.parent):
            raise ConfigError(
                f"relative import: {name} is the name of another package, {found}, "
                f"and not of {target}; rename the folder of the package"
            )
        return module

    def _load(self, path: Path) -> ModuleType:
        if path not in self._modules:
            code = compile(_parse(path), str(path), "exec", dont_inherit=True)
            module = self._modules[path] = _run(path, code, self._importers)
            for name, value in list(vars(module).items()):
                if isinstance(value, dict) and not name.startswith("_"):
                    setattr(module, name, to_node(value))  # `train.epochs = 12` works
        return self._modules[path]

    def _load_folder(self, folder: Path, names: Sequence[str]) -> ModuleType:
        """`from .models import a, b`: a namespace of the files a.py and b.py."""
        namespace = ModuleType(f"config_file.{folder.name}")
        for name in names:
            path = folder / f"{name}.py"
            if not path.is_file():
                near = did_you_mean(name, [file.stem for file in folder.glob("*.py")])
                missing = path if folder.is_dir() else folder.with_suffix(".py")
                raise ConfigError(
                    f"import of a config: there is no file {missing}{near}; a config that imports "
                    "modules of its package must lie in the package, in its folder configs"
                )
            setattr(namespace, name, self._load(path))
        return namespace
