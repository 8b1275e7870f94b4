"""To which package a file belongs, and which of its files are configs.

    my_project/
        __init__.py
        configs/x.py      a config: run for each file that imports it
        modeling/...      modules, which x.py imports with `from ..modeling import Y`

A project of this repository lies in `projects/NAME` and is the package `dn_detr.projects.NAME`,
in a checkout as in an installed wheel.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import dn_detr.projects

from .errors import ConfigError
from .zoo import zoo_root

CONFIGS = "configs"


def module_name(path: Path) -> str | None:
    """The dotted name of a module.

    Args:
        path: absolute path of a folder or of a file, without `.py`; it need not exist.

    Returns:
        The name; None where the path lies in no package, or in a folder `configs` of one.

    Raises:
        ConfigError: a folder of the package has a name that Python cannot import.
    """
    package = _package(path)
    if package is None or CONFIGS in (parts := path.relative_to(package[1]).parts):
        return None
    for part in parts:
        if not part.isidentifier():
            raise ConfigError(
                f"{part!r} in {path} cannot be the name of a package or module: rename it, "
                "with letters, digits and underscores only"
            )
    return ".".join((*package[0], *parts))


def configs_folder(name: str, importer: Path) -> Path | None:
    """The file or folder of configs that an absolute import names.

    Args:
        name: such as `dn_detr.configs.common.train` or `my_project.configs.models.x`.
        importer: the config file that imports it.

    Returns:
        Its path, without `.py`; None unless the name has a part `configs`, and begins with the
        library or the importer's own package.
    """
    package, found, rest = f"{name}.".partition(f".{CONFIGS}.")
    if not found or name.split(".")[0] not in ("dn_detr", _library(importer)):
        return None
    if package == "dn_detr":
        folder = zoo_root()
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0], CONFIGS).resolve()
    return folder.joinpath(*filter(None, rest.split(".")))


def make_importable(config_file: Path) -> None:
    """Put the folder above the outermost package of a config file on `sys.path`, at its end."""
    package = _package(config_file.resolve())
    if package is not None and not package[0]:
        folder = str(package[1])
        if folder not in sys.path:
            sys.path.append(folder)


def find_trusted(packages: Iterable[str]) -> None:
    """Look for packages or modules that cannot be imported in the current folder, too.

    Raises:
        ConfigError: one is not there either.
    """
    for package in packages:
        if not all(part.isidentifier() for part in package.split(".")):
            raise ConfigError(f"the trusted package {package!r} is not the name of a package")
        if _exists(package):
            continue
        sys.path.append(str(Path.cwd()))  # last, so that it hides nothing
        if not _exists(package):
            sys.path.pop()
            raise ConfigError(
                f"the trusted package {package} cannot be imported: run the command in the folder "
                f"that has {package.partition('.')[0]}/, install it, or add that folder to "
                "PYTHONPATH; a class is trusted by the name of its package or module"
            )


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it would lie in
        return False
    except Exception as error:  # that package may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the trusted package {module} cannot be imported: {reason}") from error


def _library(path: Path) -> str:
    """The first part of the name of the package that a file belongs to; "" without one."""
    package = _package(path.resolve())
    return (
        "" if package is None else (*package[0], *path.resolve().relative_to(package[1]).parts)[0]
    )


def _package(path: Path) -> tuple[tuple[str, ...], Path] | None:
    """Parts of a dotted name, and the folder in which the rest of the name begins."""
    for root in map(Path, dn_detr.projects.__path__):
        if path.is_relative_to(root.resolve()) and path != root.resolve():
            return ("dn_detr", "projects"), root.resolve()
    folders = [path, *path.parents]
    while folders and not (folders[0] / "__init__.py").is_file():
        folders.pop(0)  # a folder of configs has no __init__.py, nor has one inside it
    if not folders:
        return None
    while (folders[0].parent / "__init__.py").is_file():
        folders.pop(0)
    return (), folders[0].parent
