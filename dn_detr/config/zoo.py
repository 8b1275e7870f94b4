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
    near = did_you_mean(name, zoo_names()) or f", which has {', '.join(list_configs())}"
    raise ConfigError(f"no config {name!r} in the zoo {zoo}{near}")


def zoo_names() -> list[str]:
    """Names of all files of the zoo, those of sub-folders included; empty without a zoo."""
    try:
        root = zoo_root()
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
        return sorted({*names, *list_configs()})
    except ConfigError:
        return []


def near_files(path: Path) -> str:
    """Suggest a file for a path that does not exist: from its folder, else from the zoo."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder}){did_you_mean(path.name, zoo_names())}"
    beside = [str(folder / entry.name) for entry in folder.iterdir() if entry.is_file()]
    configs = [name for name in beside if name.endswith((".py", ".yaml", ".yml"))]
    return did_you_mean(str(path), configs) or did_you_mean(path.name, zoo_names())


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
