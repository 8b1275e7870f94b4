"""`LazyConfig`: load, change and save configs; `get_config`: load one of the zoo."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, did_you_mean
from .nodes import has_key, to_node
from .overrides import apply_overrides
from .python_file import read_python
from .serialize import to_plain
from .targets import mark_data
from .yaml_file import read_yaml, write_yaml
from .zoo import near_files, zoo_path


class LazyConfig:
    """Functions on whole configs: a config is one DictConfig root."""

    @staticmethod
    def load(
        path: str | Path, keys: str | Sequence[str] | None = None, allow: Iterable[str] = ()
    ) -> Any:
        """Load a config file.

        A .py file is code and runs. A .yaml or .yml file is data: instantiating it can only
        reach classes and functions of `targets.DATA_PACKAGES` and of `allow`.

        Args:
            path: the file.
            keys: a name, or several, to return instead of the whole config.
            allow: further packages that a YAML file may instantiate from, such as "my_project".

        Returns:
            The root: DictConfig of all public data of the file. With `keys`, the value of that
            name or a tuple of values, still in their tree, so that interpolations resolve.

        Raises:
            ConfigError: the file is missing, of another type or wrong, or has no such key.
        """
        root = _read(Path(path), tuple(allow))
        if keys is None:
            return root
        names = [keys] if isinstance(keys, str) else list(keys)
        for name in names:
            if not has_key(root, name):
                near = did_you_mean(name, map(str, root.keys()))
                raise ConfigError(f"{path}: has no {name!r}{near}")
        values = tuple(root[name] for name in names)
        return values[0] if isinstance(keys, str) else values

    @staticmethod
    def load_rel(
        filename: str, keys: str | Sequence[str] | None = None, allow: Iterable[str] = ()
    ) -> Any:
        """`load` with a path relative to the folder of the calling file."""
        caller = Path(sys._getframe(1).f_code.co_filename)
        return LazyConfig.load(caller.parent / filename, keys, allow)

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
        """A copy of the config with overrides such as `train.seed=1` applied; see docs/configs.md.

        Args:
            cfg: the config; it is not changed.
            overrides: tokens in hydra's grammar, applied in order.

        Returns:
            The changed copy.

        Raises:
            ConfigError: unknown key, wrong type or bad syntax; names the token and the remedy.
        """
        return apply_overrides(cfg, overrides)

    @staticmethod
    def to_yaml(cfg: Container, *, resolve: bool = False) -> str:
        """YAML text of a config, which `load` reads back.

        Args:
            cfg: the config.
            resolve: replace interpolations by their values (references to nodes with
                `_shared_: true` stay references).

        Returns:
            The text; `_target_` and other callables are dotted names.

        Raises:
            ConfigError: a lambda or another object without an importable name, or a broken
                interpolation; names the key.
        """
        return write_yaml(to_plain(cfg, resolve=resolve))

    @staticmethod
    def save(cfg: DictConfig, path: str | Path, *, resolve: bool = False) -> None:
        """Write `to_yaml(cfg)` to a file.

        Raises:
            ConfigError: see `to_yaml`; then the file is not touched.
        """
        text = LazyConfig.to_yaml(cfg, resolve=resolve)
        Path(path).write_text(text, encoding="utf-8")


def get_config(name: str) -> DictConfig:
    """Load a config of the zoo.

    Args:
        name: `dn_deformable_detr_r50_50ep.py` (with or without `.py`), or a file of a sub-folder
            such as `common/train.py`.

    Returns:
        Root of a private copy of the config.

    Raises:
        ConfigError: there is no such config.
    """
    root: DictConfig = LazyConfig.load(zoo_path(name))
    return root


def _read(path: Path, allow: tuple[str, ...]) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist{near_files(path)}")
    if path.suffix in (".yaml", ".yml"):
        root = read_yaml(path)
        mark_data(root, allow)
        return root
    if path.suffix != ".py":
        raise ConfigError(f"config file {path}: is neither a .py nor a .yaml file")
    try:
        root = to_node(read_python(path))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    return root
