"""The arguments that the commands have in common."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from omegaconf import DictConfig

from .lazy_config import LazyConfig
from .zoo import resolve_config_file


def add_trust_argument(parser: ArgumentParser) -> None:
    """Add `--trust`, which gives a list of packages."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let a YAML config name classes and functions of this package; may be repeated",
    )


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add `--config-file`, `--trust` and overrides, which `load_config` reads."""
    parser.epilog = "Overrides: key=value changes a key, +key=value adds one, ~key removes one."
    parser.add_argument(
        "--config-file", required=True, metavar="F", help="path of a config, or a name of the zoo"
    )
    add_trust_argument(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")


def load_config(arguments: Namespace) -> DictConfig:
    """Load the config that a command line names, with its overrides.

    Raises:
        ConfigError: see `LazyConfig.load`.
    """
    path = resolve_config_file(arguments.config_file)
    return LazyConfig.load(path, allow=arguments.trust, overrides=arguments.overrides)
