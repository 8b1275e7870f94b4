"""Fixtures of all tests."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest

# What the server of tests/engine/runs.py imports once for the processes that it forks.
multiprocessing.set_forkserver_preload(
    ["dn_detr.checkpoint", "hypothesis", "pytest", "tests.engine.runs", "tools.submit"]
)


# Who starts the tests by nohup has this ignored, and so would have every process of theirs.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with Slurm's jobs, which wait for minutes while other tests use the cores."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder of reference data beside the checkout; users do not have it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the developers' reference data (../shared), which is not published")
    return path
