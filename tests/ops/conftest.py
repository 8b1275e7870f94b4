"""Which kernels compute the operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dn_detr.ops import missing_kernels, use_kernels

from .emulator import building


@pytest.fixture(params=["pytorch", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that the operators of ``dn_detr.ops`` use in a test."""
    problem = missing_kernels("cpu")
    if request.param == "compiled" and problem is not None:
        pytest.skip(problem)
    with use_kernels("auto" if request.param == "compiled" else "pytorch"):
        yield request.param


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The CUDA operators for CPU tensors, ``torch.ops.dn_detr_emulated``."""
    if building.compiler() is None:
        pytest.skip("needs g++ on Linux to compile the CUDA kernels for the CPU")
    torch.ops.load_library(str(building.build()))
    return torch.ops.dn_detr_emulated
