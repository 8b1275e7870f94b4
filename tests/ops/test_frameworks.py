"""The operators under torch.compile, torch.export, autocast, and without their library."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dn_detr.layers import MSDeformAttn
from dn_detr.ops import library, ms_deform_attn, ms_deform_attn_fused, use_kernels

from .cases import computed, make_case

ROOT = Path(__file__).resolve().parents[2]
KERNELS = pytest.mark.parametrize("kernels", ["pytorch", "compiled"], indirect=True)


# ---- registration ----


@KERNELS
@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_operators_are_well_formed(kernels, coordinates):
    case = make_case(coordinates=coordinates, masked=True)
    arguments = case.changed(**{k: x.requires_grad_() for k, x in case.leaves.items()}).arguments
    name = "ms_deform_attn_fused" if coordinates else "ms_deform_attn"
    forward = getattr(torch.ops.dn_detr, name).default
    backward = getattr(torch.ops.dn_detr, f"{name}_backward").default
    torch.library.opcheck(forward, arguments)
    detached = [None if x is None else x.detach() for x in arguments]
    torch.library.opcheck(backward, (case.grad_output, *detached))


def test_second_derivatives_are_refused():
    case = make_case(torch.float64)
    value = case["value"].requires_grad_()
    out = ms_deform_attn(*case.arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="ms_deform_attn_backward"):
        grad.sum().backward()


@KERNELS
@pytest.mark.parametrize("coordinates", [0, 2])
def test_forward_mode_derivatives_are_refused(kernels, coordinates):
    case = make_case(torch.float64, coordinates=coordinates)
    operator = ms_deform_attn_fused if coordinates else ms_deform_attn

    def of_value(value: Tensor) -> Tensor:
        return operator(value, *case.arguments[1:])

    value = case["value"]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_value, (value,), (torch.ones_like(value),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jacfwd(of_value)(value)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="no forward-mode derivative"),
    ):
        of_value(forward_ad.make_dual(value, torch.ones_like(value)))
    assert torch.func.jvp(lambda _: of_value(value), (value,), (value,))[1].count_nonzero() == 0


def test_inputs_changed_before_the_backward_are_noticed():
    case = make_case()
    case["value"].requires_grad_()
    weights = case["attention_weights"].clone()
    out = ms_deform_attn(*case.changed(attention_weights=weights).arguments)
    weights.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@KERNELS
def test_views_that_negate_are_read_negated(kernels):
    """PyTorch keeps the sign of an imaginary part beside the numbers until it is asked for."""
    case = make_case()
    value = torch.complex(torch.zeros_like(case["value"]), -case["value"]).conj().imag
    assert value.is_neg() and torch.equal(value, case["value"])
    out = ms_deform_attn(*case.changed(value=value).arguments)
    torch.testing.assert_close(out, ms_deform_attn(*case.arguments))


# ---- the attention layer, as models call it ----


def _layer_inputs(batch: int = 2, queries: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[6, 5], [3, 3]])
    starts = torch.tensor([0, 30])
    query = torch.randn(batch, queries, 32, generator=generator)
    references = torch.rand(batch, queries, 2, 4, generator=generator)
    memory = torch.randn(batch, 39, 32, generator=generator)
    mask = torch.rand(batch, 39, generator=generator) < 0.2
    return query, references, memory, shapes, starts, mask


@pytest.fixture
def layer() -> MSDeformAttn:
    torch.manual_seed(0)
    module = MSDeformAttn(32, 4, 2, 3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


@pytest.mark.parametrize("name", ["embed_dim", "num_heads", "num_levels", "num_points"])
@pytest.mark.parametrize("number", [0, -8])
def test_layer_needs_positive_numbers(name, number):
    with pytest.raises(ValueError, match=f"{name} {number}.* must be positive"):
        MSDeformAttn(**{name: number})


@KERNELS
def test_layer_compiles_into_one_graph(kernels, layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = _layer_inputs()
    layer(*inputs).square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    out = compiled(*inputs)
    out.square().sum().backward()
    torch.testing.assert_close(out, layer(*inputs))
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@KERNELS
def test_layer_exports_with_any_batch_and_queries(kernels, layer):
    batch, queries = torch.export.Dim("batch", min=1), torch.export.Dim("queries", min=1)
    dynamic = (
        {0: batch, 1: queries},
        {0: batch, 1: queries},
        {0: batch},
        None,
        None,
        {0: batch},
    )
    program = torch.export.export(layer, _layer_inputs(), dynamic_shapes=dynamic)
    assert "dn_detr.ms_deform_attn_fused" in str(program.graph)
    others = _layer_inputs(batch=3, queries=8)
    torch.testing.assert_close(program.module()(*others), layer(*others))


@pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_under_autocast_is_near_float32(kernels, layer, dtype):
    inputs = _layer_inputs()
    layer(*inputs).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(*inputs)
    assert out.dtype == dtype
    out.float().sum().backward()
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.01  # the linear layers round more than we
    expected = layer(*inputs)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        if "offsets" not in name:  # rounded locations lie in other cells, with other slopes
            error = (parameter.grad - gradients[name]).norm()
            assert error <= 3 * tolerance * gradients[name].norm(), name


@pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_half_coordinates_are_widened_and_their_gradients_narrowed(kernels, narrow):
    case = make_case(narrow, coordinates=2)
    halves = {k: x.to(narrow) for k, x in case.leaves.items()}
    wide = {k: x if k == "value" else x.float() for k, x in halves.items()}
    results, others = computed(case.changed(**halves)), computed(case.changed(**wide))
    for name, result in results.items():
        assert result.dtype == narrow
        assert torch.equal(result, others[name].to(narrow))


# ---- kernels that are missing ----


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As if the installation had built nothing."""
    caches: list[Any] = [
        x for x in vars(library).values() if callable(getattr(x, "cache_clear", None))
    ]
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(library, "CPU_LIBRARY", tmp_path / "_C.so")
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def test_missing_library_is_warned_of_once_with_the_reason(no_library):
    case = make_case(coordinates=2, masked=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = [ms_deform_attn_fused(*case.arguments) for _ in range(3)]
    (warning,) = caught
    assert "the installation built no _C.so" in str(warning.message)
    with use_kernels("pytorch"):
        assert torch.equal(outputs[0], ms_deform_attn_fused(*case.arguments))


def test_chosen_pytorch_kernels_are_not_warned_of(no_library):
    with warnings.catch_warnings(), use_kernels("pytorch"):
        warnings.simplefilter("error")
        ms_deform_attn(*make_case().arguments)


def _run(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import torch, dn_detr.ops as ops; {program}"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_environment_chooses_the_instruction_set(cpu_operators):
    program = "ops.missing_kernels('cpu'); print(torch.ops.dn_detr_C.cpu_kernels())"
    assert _run(program, DN_DETR_CPU_KERNELS="portable") == "portable"
    assert _run(program) == cpu_operators.cpu_kernels()


def test_documentation_lists_no_kernels_that_are_refused():
    documented = re.findall(r'`"(\w+)"`', use_kernels.__doc__ or "")
    assert documented
    for kernels in documented:
        with use_kernels(kernels):
            pass
    with pytest.raises(ValueError, match="no kernels 'gpu'"), use_kernels("gpu"):
        pass
