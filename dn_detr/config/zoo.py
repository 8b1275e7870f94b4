"""Where the configs of the zoo and of the projects lie, and how a name finds its file."""

from __future__ import annotations

from pathlib import Path

import dn_detr.projects

from .errors import ConfigError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]


def zoo_root() -> Path:
    """Folder of the zoo: `dn_detr/configs` of an installed package, `configs` of a checkout.

    Raises:
        ConfigError: there is neither.
    """
    candidates = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " and ".join(map(str, candidates))
    raise ConfigError(f"the config zoo is missing: tried {tried}; install dn_detr again")


def project_folders() -> list[Path]:
    """Folders of the projects of `dn_detr.projects`, sorted by name."""
    below = [path for root in dn_detr.projects.__path__ for path in Path(root).glob("*/")]
    found = [path for path in below if (path / "__init__.py").is_file()]
    return sorted(found, key=lambda path: path.name)


def list_configs() -> list[str]:
    """Names of the runnable configs, sorted: files of the zoo and of the projects' `configs`.

    Those of sub-folders such as `common/` and `models/` are parts of them.
    """
    folders = [zoo_root(), *(project / "configs" for project in project_folders())]
    return sorted(path.name for root in folders for path in root.glob("[!_]*.py"))


def zoo_path(name: str) -> Path:
    """File of a config of the zoo or of a project.

    Args:
        name: `dn_deformable_detr_r50_50ep.py`, the same without `.py`, or a file of a sub-folder
            of the zoo such as `common/train.py`.

    Returns:
        The existing file.

    Raises:
        ConfigError: there is no such config; the message has the nearest name.
    """
    zoo = zoo_root()
    for root in (zoo, *(project / "configs" for project in project_folders())):
        for candidate in (root / name, root / f"{name}.py"):
            inside = candidate.resolve().is_relative_to(root.resolve())
            if inside and candidate.suffix == ".py" and candidate.is_file():
                return candidate
    names = [*list_configs(), *(path.relative_to(zoo).as_posix() for path in zoo.rglob("*.py"))]
    near = did_you_mean(name, names) or f", which has {', '.join(list_configs())}"
    raise ConfigError(f"no config {name!r} in the zoo {zoo}{near}")


def near_files(path: Path) -> str:
    """Suggest a config file from the folder of a path that does not exist."""
    kinds = ("*.py", "*.yaml", "*.yml")
    return did_you_mean(str(path), [str(file) for kind in kinds for file in path.parent.glob(kind)])


def resolve_config_file(path_or_name: str) -> Path:
    """File that `--config-file` names: a path, or a config of the zoo.

    Args:
        path_or_name: path of an existing .py or .yaml file, which wins; else a name of the zoo.

    Returns:
        The existing file.

    Raises:
        ConfigError: there is neither; the message says what was tried and what is near.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    try:
        return zoo_path(path_or_name)
    except ConfigError as error:
        raise ConfigError(
            f"no config file {path_or_name!r}: {path.absolute()} is no file{near_files(path)}, "
            f"and {error}"
        ) from None
