"""Fixtures of the tests that interrupt runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.processes import SLOW_CONFIG, assert_success, start


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes of train_net.py that was not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = ("tools/train_net.py", "--config-file", SLOW_CONFIG, "--num-gpus", "2")
    assert_success(start(*command, f"train.output_dir={folder}"))
    return folder
