"""Fixtures of the tests that interrupt runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.runs import run_tool
from tests.tools.processes import SLOW_CONFIG


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes of train_net.py that was not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = ("train_net", "--config-file", SLOW_CONFIG, "--num-gpus", "2")
    ended = run_tool(*command, f"train.output_dir={folder}")
    assert ended.returncode == 0, ended.stderr
    return folder
