"""Processes that may not write and read everywhere, as root may."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import pytest


def unprivileged(*command: str) -> Sequence[str]:
    """The command without root's rights to files; the test is skipped where they cannot be shed."""
    if os.geteuid() != 0:
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere; setpriv (util-linux) would take that away")
    return "setpriv", "--bounding-set=-dac_override,-dac_read_search", *command
