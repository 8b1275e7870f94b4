"""Configs: Python files of lazy calls, typed overrides, YAML, the zoo. See docs/configs.md."""

from .errors import ConfigError as ConfigError
from .instantiate import instantiate as instantiate
from .lazy_call import LazyCall as LazyCall
from .lazy_config import LazyConfig as LazyConfig
from .lazy_config import get_config as get_config
from .zoo import list_configs as list_configs
from .zoo import resolve_config_file as resolve_config_file
from .zoo import zoo_path as zoo_path
