"""Which kernels compute the operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dn_detr.ops import missing_kernels, use_kernels


@pytest.fixture(params=["pytorch", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that the operators of ``dn_detr.ops`` use in a test."""
    problem = missing_kernels("cpu")
    if request.param == "compiled" and problem is not None:
        pytest.skip(problem)
    with use_kernels("auto" if request.param == "compiled" else "pytorch"):
        yield request.param
