"""`LazyConfig`: load, change and save configs; `get_config`: load one of the zoo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError
from .nodes import to_node
from .overrides import apply_overrides
from .packages import find_trusted
from .python_file import read_python
from .yaml_check import check_targets, check_values
from .yaml_file import read_yaml, write_yaml
from .zoo import near_files, zoo_path


class LazyConfig:
    """Functions on whole configs: a config is one DictConfig root."""

    @staticmethod
    def load(
        path: str | Path,
        *,
        allow: str | Iterable[str] = (),
        overrides: Sequence[str] = (),
    ) -> DictConfig:
        """Load a config file.

        A .py file is code and runs. A .yaml or .yml file is data: it can only name what
        `yaml_check` lists and what `allow` names, which is checked here, after the overrides.

        Args:
            path: the file.
            allow: a further package, or several, that a YAML file may name, such as
                "my_project"; one that cannot be imported is looked for in the current folder.
            overrides: see `apply_overrides`.

        Returns:
            The root, all public data of the file. A `train.output_dir` that a whole config leaves
            open is `output/<name of the file>`.

        Raises:
            ConfigError: the file is missing, of another type or wrong, or an override is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"config file {path} does not exist, or is no file{near_files(path)}")
        if path.suffix in (".yaml", ".yml"):
            return load_yaml(path, path, allow, overrides)
        if path.suffix != ".py":
            raise ConfigError(f"config file {path}: is neither a .py nor a .yaml file")
        try:
            root: DictConfig = to_node(read_python(path))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}: {error}") from error
        train = root.get("train")
        if (
            "model" in root
            and OmegaConf.is_dict(train)
            and OmegaConf.is_missing(train, "output_dir")
        ):
            train.output_dir = f"output/{path.stem}"
        return apply_overrides(root, overrides)

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
            resolve: replace interpolations by their values.

        Returns:
            The text; `_target_` and other callables are dotted names.

        Raises:
            ConfigError: a lambda or another object without an importable name, or a broken
                interpolation; names the key.
        """
        return write_yaml(cfg, resolve=resolve)

    @staticmethod
    def save(cfg: DictConfig, path: str | Path, *, resolve: bool = False) -> None:
        """Write `to_yaml(cfg)` to a file.

        Raises:
            ConfigError: see `to_yaml`; then the file is not touched.
        """
        text = LazyConfig.to_yaml(cfg, resolve=resolve)
        Path(path).write_text(text, encoding="utf-8")


def load_yaml(
    source: Path | str,
    name: str | Path,
    allow: str | Iterable[str] = (),
    overrides: Sequence[str] = (),
) -> DictConfig:
    """Load a YAML config, see `LazyConfig.load`.

    Args:
        source: the file, or its text.
        name: of the file, for messages.
        allow: see `LazyConfig.load`.
        overrides: see `apply_overrides`.

    Returns:
        The root.

    Raises:
        ConfigError: the config or an override is wrong, or names what is not allowed.
    """
    packages = (allow,) if isinstance(allow, str) else tuple(allow)
    find_trusted(packages)
    root = read_yaml(source, name)
    check_values(root, name)
    root = apply_overrides(root, overrides)
    check_values(root, name)
    check_targets(root, name, packages)
    return root


def get_config(name: str) -> DictConfig:
    """Load a config of the zoo or of a project of `dn_detr.projects`.

    Args:
        name: `dn_deformable_detr_r50_50ep.py` (with or without `.py`), or a file of a sub-folder
            of the zoo such as `common/train.py`.

    Returns:
        Root of a private copy of the config.

    Raises:
        ConfigError: there is no such config.
    """
    return LazyConfig.load(zoo_path(name))
