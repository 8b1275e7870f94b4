"""Configs: Python files of lazy calls, typed overrides, YAML, the zoo. See docs/configs.md."""

from dn_detr.config.errors import ConfigError
from dn_detr.config.instantiate import instantiate
from dn_detr.config.lazy_call import LazyCall
from dn_detr.config.lazy_config import LazyConfig, get_config
from dn_detr.config.zoo import list_configs, resolve_config_file, zoo_path

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
