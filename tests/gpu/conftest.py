"""The device of these tests: an NVIDIA GPU with compiled operators; they skip without one.

`make gpu-check` builds the operators and runs them. `GPU_TESTS_DEVICE=cpu` runs them on the
CPU, which finds mistakes in the tests themselves where there is no GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from dn_detr.ops import missing_kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where to compute."""
    name = os.environ.get("GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that PyTorch can use")
    if (problem := missing_kernels(name)) is not None:
        pytest.skip(problem)
    return torch.device(name)
