"""Python programs of the repository in processes of their own, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from dn_detr.checkpoint import read_weights
from tests.engine.runs import wait_until

ROOT = Path(__file__).resolve().parents[2]
SLOW_CONFIG = str(ROOT / "tests" / "tools" / "slow_config.py")
# This code also where another copy is installed; rounding depends on the number of threads.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: str) -> subprocess.Popen[str]:
    """Python with these arguments, in the repository."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **ENVIRONMENT},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_success(*processes: subprocess.Popen[str]) -> None:
    """Wait for all; each must exit with 0."""
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)


def wait_for_log(folder: Path, text: str) -> None:
    """Until the run in `folder` has logged `text`."""
    log = folder / "log.txt"

    def logged() -> str:
        return log.read_text() if log.exists() else ""

    wait_until(lambda: text in logged(), logged)


def assert_equal_weights(first: Path, second: Path) -> None:
    """To the last bit, in the last checkpoints of two runs."""
    expected, found = read_weights(first), read_weights(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
