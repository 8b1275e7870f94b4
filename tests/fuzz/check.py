"""What must hold of every call of the operators, for the kernels of the CPU and for emulated CUDA.

Arguments that do not fit raise a ValueError that names one of them. With others, results are those
of float64 in plain PyTorch, and the same bits for every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch
from torch import Tensor

from dn_detr.ops import eager

ROUNDING = {torch.bfloat16: 1.05 * 2.0**-8, torch.float16: 1.05 * 2.0**-11}
# Of the largest number; more than in the tests of accuracy, for there are millions of cases.
TOLERANCE = {torch.float64: 1e-11}
DEFAULT_TOLERANCE = 1e-4


def load(library: Path) -> Any:
    """The operators of a library: `torch.ops.dn_detr_emulated` if its name says so."""
    torch.ops.load_library(str(library))
    return getattr(torch.ops, f"dn_detr_{library.stem.lstrip('_')}")


def check(operators: Any, case: cases.Case) -> bool:
    """Calls forward and backward; whether the case was refused.

    Raises:
        AssertionError: the operators did something else than they must.
    """
    inputs = list(case.tensors.values())
    emulated = not hasattr(operators, "use_cpu_kernels")
    forward, *backwards = _functions(operators, case, emulated)
    error = case.error()
    if error is not None:
        _must_raise(case, error, forward, *inputs)
    else:
        error = case.grad_error()
    if error is not None:
        for backward in backwards:
            _must_raise(case, error, backward, case.grad_output, *inputs)
        return True
    for backward in backwards:

        def call(backward: Callable[..., Any] = backward) -> list[Tensor]:
            return [forward(*inputs), *backward(case.grad_output, *inputs)]

        _compare(case, call() if emulated else _with_threads(case, call))
    return False


def _functions(operators: Any, case: cases.Case, emulated: bool) -> list[Callable[..., Any]]:
    """Forward and the kinds of backward; chooses the instruction set."""
    name = "ms_deform_attn_fused" if case.fused else "ms_deform_attn"
    names = [f"{name}_forward", f"{name}_backward"]
    if emulated:
        names.append(f"{name}_backward_deterministic")
    else:
        try:
            operators.use_cpu_kernels(case.kernels)
        except ValueError:
            operators.use_cpu_kernels("")
    return [getattr(operators, name) for name in names]


def _must_raise(case: cases.Case, reason: str, operator: Any, *inputs: Tensor | None) -> None:
    try:
        operator(*inputs)
    except ValueError as error:
        names = [*case.tensors, "grad_output"]
        assert any(name in str(error) for name in names), f"the error names nothing: {error}"
    else:
        raise AssertionError(f"not refused: {reason}")


def _with_threads(case: cases.Case, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Results with many threads, after seeing that one gives the same."""
    torch.set_num_threads(case.threads)
    results = call()
    torch.set_num_threads(1)
    for name, together, alone in zip(_names(case), results, call(), strict=True):
        same = torch.equal(together.isnan(), alone.isnan())
        same = same and torch.equal(together.nan_to_num(), alone.nan_to_num())
        assert same, f"{name} depends on the number of threads"
    return results


def _names(case: cases.Case) -> list[str]:
    """Of the results: what a gradient belongs to."""
    return ["output", *(name for name in case.floats)]


def _compare(case: cases.Case, results: list[Tensor]) -> None:
    """Results against float64, where the same numbers can be expected; shapes and types always."""
    wanted = _expected(case)
    shapes = case.tensors["spatial_shapes"]
    longest = int(shapes.clamp_max(100).max()) if shapes.numel() else 0
    for name, got, expected in zip(_names(case), results, wanted, strict=True):
        like = case.tensors["value" if name == "output" else name]
        assert (got.shape, got.dtype) == (expected.shape, like.dtype), f"{name}: {got.shape}"
        if name not in case.same_numbers or not got.numel():
            continue
        assert torch.equal(got.isfinite(), expected.isfinite()), f"{name}: other NaN or infinity"
        largest = max(1.0, float(_finite(expected).abs().max()))
        error = float(_finite(got.double() - expected).abs().max()) / largest
        limit = TOLERANCE.get(got.dtype, DEFAULT_TOLERANCE) * (1 + longest / 100)
        limit += ROUNDING.get(got.dtype, 0.0)
        assert error <= limit, f"{name}: error {error:.1e}, more than {limit:.1e}"


def _expected(case: cases.Case) -> list[Tensor]:
    inputs = [
        x.double() if x is not None and x.is_floating_point() else x for x in case.tensors.values()
    ]
    forward: Any = eager.fused_forward if case.fused else eager.forward
    backward: Any = eager.fused_backward if case.fused else eager.backward
    return [forward(*inputs), *backward(case.grad_output.double(), *inputs)]


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0, 0, 0)
