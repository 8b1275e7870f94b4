"""Fixtures that choose the kernels of the operators."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dn_detr.ops import missing_kernels, use_kernels

from . import emulated

# The module, which the function of the same name hides in the package.
FACE = sys.modules["dn_detr.ops.ms_deform_attn"]
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@pytest.fixture(scope="session")
def cpu_operators() -> Any:
    """`torch.ops.dn_detr_C`."""
    if (problem := missing_kernels("cpu")) is not None:
        pytest.skip(problem)
    return torch.ops.dn_detr_C


@pytest.fixture(scope="session")
def emulated_operators() -> Any:
    """`torch.ops.dn_detr_emulated`: CUDA kernels on the CPU."""
    library = emulated.library()
    if library is None:
        pytest.skip("needs g++ on Linux to compile the CUDA kernels for the CPU")
    torch.ops.load_library(str(library))
    return torch.ops.dn_detr_emulated


@pytest.fixture(params=["pytorch", *INSTRUCTION_SETS, "emulated"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The public functions compute with these; `compiled` chooses the best of this processor."""
    name = request.param
    if name == "pytorch":
        with use_kernels("pytorch"):
            yield name
        return
    if name == "emulated":
        operators = request.getfixturevalue("emulated_operators")
        monkeypatch.setattr(FACE, "compiled_operators", lambda device: operators)
        yield name
        return
    operators = request.getfixturevalue("cpu_operators")
    before = operators.cpu_kernels()
    try:
        operators.use_cpu_kernels("" if name == "compiled" else name)
    except ValueError:
        pytest.skip(f"this processor has no {name}")
    yield name
    operators.use_cpu_kernels(before)
