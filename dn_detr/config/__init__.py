"""Configs: Python files of lazy calls, typed overrides, YAML, the zoo. See docs/configs.md."""

from .errors import ConfigError
from .instantiate import instantiate
from .lazy_call import LazyCall
from .lazy_config import LazyConfig, get_config
from .zoo import list_configs, resolve_config_file, zoo_path

__all__ = [
    "ConfigError",
    "LazyCall",
    "LazyConfig",
    "get_config",
    "instantiate",
    "list_configs",
    "resolve_config_file",
    "zoo_path",
]
