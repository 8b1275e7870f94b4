"""Shared: the tiny config, with or without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest
from omegaconf import DictConfig

from dn_detr.config import LazyConfig

TINY_CONFIG = Path(__file__).with_name("tiny_config.py")


class MakeConfig(Protocol):
    def __call__(self, *overrides: str) -> DictConfig: ...


@pytest.fixture
def tiny_config(tmp_path: Path) -> MakeConfig:
    """A function from overrides to a config whose output folder is `tmp_path/run`."""

    def make(*overrides: str) -> DictConfig:
        cfg = LazyConfig.load(TINY_CONFIG)
        return LazyConfig.apply_overrides(cfg, [f"train.output_dir={tmp_path}/run", *overrides])

    return make
