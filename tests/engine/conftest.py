"""Shared: the tiny config, with or without running it, and ranks that start at once."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest
import torch
from omegaconf import DictConfig

from dn_detr.config import LazyConfig

from .runs import start_forked

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


@pytest.fixture(autouse=True)
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch` forks, because importing torch takes longer than what ranks do in these tests."""
    monkeypatch.setattr(torch.multiprocessing, "start_processes", start_forked)
