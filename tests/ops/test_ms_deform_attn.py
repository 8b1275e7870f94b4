"""The operators as users call them, with compiled kernels and in plain PyTorch.

Against a direct formula, grid_sample in float64, finite differences, and PyTorch's own checks.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dn_detr.layers import MSDeformAttn
from dn_detr.ops import library, ms_deform_attn, ms_deform_attn_fused, use_kernels

from .cases import (
    DTYPES,
    FEW,
    MANY,
    Case,
    FusedCase,
    assert_agree,
    expected,
    expected_fused,
    make_case,
    make_fused_case,
    strided,
)

SHAPES = [(5, 7), (3, 4), (1, 2)]


def _differentiated(function, case: Case | FusedCase, wanted: tuple[int, ...]):
    inputs = [x.detach().clone() if x is not None else None for x in case.inputs]
    leaves = [inputs[i].requires_grad_() for i in wanted]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, leaves, case.grad_output)


def computed(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients of value, locations and weights."""
    return _differentiated(ms_deform_attn, case, (0, 3, 4))


def computed_fused(case: FusedCase) -> tuple[Tensor, ...]:
    """Output and gradients of value, reference points, offsets and logits."""
    return _differentiated(ms_deform_attn_fused, case, (0, 3, 4, 5))


# ---- numbers ----


def _pixel(value: Tensor, y: int, x: int, height: int, width: int, start: int) -> Tensor:
    inside = 0 <= y < height and 0 <= x < width
    return value[start + y * width + x] if inside else torch.zeros_like(value[0])


def _direct(value, shapes, starts, locations, weights) -> Tensor:
    """One sample at a time, straight from the definition."""
    batch, queries, heads, levels, points, _ = locations.shape
    out = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    indices = itertools.product(*map(range, (batch, queries, heads, levels, points)))
    for b, q, h, level, p in indices:
        height, width = shapes[level].tolist()
        x = locations[b, q, h, level, p, 0].item() * width - 0.5
        y = locations[b, q, h, level, p, 1].item() * height - 0.5
        x0, y0 = math.floor(x), math.floor(y)
        for dy, dx in itertools.product((0, 1), (0, 1)):
            share = (1 - abs(y - y0 - dy)) * (1 - abs(x - x0 - dx))
            cell = _pixel(value[b, :, h], y0 + dy, x0 + dx, height, width, int(starts[level]))
            out[b, q, h] += weights[b, q, h, level, p] * share * cell
    return out.flatten(2)


@pytest.mark.parametrize("queries", [FEW, 30])
def test_forward_is_the_definition(kernels, queries):
    case = make_case(torch.float64, shapes=SHAPES, queries=queries, dim=4, points=3)
    torch.testing.assert_close(ms_deform_attn(*case.inputs), _direct(*case.inputs))


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_float64(kernels, dtype, queries):
    case = make_case(dtype, queries=queries)
    assert_agree(computed(case), expected(case))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_results_are_those_of_float64(kernels, dtype, coordinates, masked):
    case = make_fused_case(dtype, queries=MANY, coordinates=coordinates, masked=masked)
    assert_agree(computed_fused(case), expected_fused(case))


@pytest.mark.parametrize("dim", [6, 300])
def test_head_dims_without_compiled_kernels_are_computed_all_the_same(kernels, dim):
    case = make_case(dim=dim)
    assert_agree(computed(case), expected(case))


@pytest.mark.parametrize("queries", [2, 30])
def test_gradients_are_finite_differences(kernels, queries):
    case = make_case(
        torch.float64, shapes=[(3, 4), (1, 2)], batch=1, queries=queries, dim=4, points=2
    )
    inputs = [x.requires_grad_(x.is_floating_point()) for x in case.inputs]
    assert torch.autograd.gradcheck(ms_deform_attn, inputs)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("queries", [2, 30])
def test_fused_gradients_are_finite_differences(kernels, queries, coordinates):
    case = make_fused_case(
        torch.float64, shapes=[(3, 4), (1, 2)], batch=1, queries=queries, heads=1, dim=4, points=2,
        coordinates=coordinates, masked=True,
    )  # fmt: skip
    inputs = [x.requires_grad_(x.is_floating_point()) for x in case.inputs]
    assert torch.autograd.gradcheck(ms_deform_attn_fused, inputs)


def test_a_sample_on_the_border_of_two_cells_has_one_of_the_two_gradients(kernels):
    """There the location's gradient jumps; all others are those of the definition."""
    case = make_fused_case(torch.float64, shapes=[(4, 8)], coordinates=2, masked=False, points=1)
    case.reference_points[:] = (torch.tensor([3.0, 2.0]) + 0.5) / torch.tensor([8.0, 4.0])
    case.offsets[:] = 0  # on the centre of cell (2, 3)
    out, grad_value, _, grad_offsets, _ = computed_fused(case)
    centre = case.value[:, 2 * 8 + 3].flatten(1)[:, None]
    torch.testing.assert_close(out, centre.expand_as(out))
    torch.testing.assert_close(
        grad_value[:, 2 * 8 + 3].flatten(1), case.grad_output.sum(1), atol=1e-12, rtol=1e-12
    )
    heads = case.grad_output.unflatten(-1, (2, 32))
    grid = case.value.unflatten(1, (4, 8))
    for axis, (dy, dx) in enumerate([(0, 1), (1, 0)]):
        after = grid[:, 2 + dy, 3 + dx] - grid[:, 2, 3]
        before = grid[:, 2, 3] - grid[:, 2 - dy, 3 - dx]
        slopes = [(heads * slope[:, None]).sum(-1) for slope in (after, before)]
        found = grad_offsets[:, :, :, 0, 0, axis]
        assert any(torch.allclose(found, slope) for slope in slopes)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    batch=st.integers(0, 3),
    queries=st.integers(0, 40),
    heads=st.integers(1, 3),
    quarter_dim=st.integers(1, 20),
    points=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(range(4)),
    chosen=st.sampled_from(["auto", "pytorch"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_strides(
    shapes, batch, queries, heads, quarter_dim, points, dtype, order, chosen, seed
):
    kwargs = dict(
        shapes=shapes, batch=batch, queries=queries, heads=heads, dim=4 * quarter_dim,
        points=points, seed=seed,
    )  # fmt: skip
    case = make_case(dtype, **kwargs)
    coordinates, masked = 2 + 2 * (seed % 2), seed % 3 == 0
    fused = make_fused_case(dtype, **kwargs, coordinates=coordinates, masked=masked)
    with use_kernels(chosen):
        case = case._replace(value=strided(case.value, tuple(order)))
        assert_agree(computed(case), expected(case))
        fused = fused._replace(
            value=strided(fused.value, tuple(order)), logits=strided(fused.logits, tuple(order))
        )
        assert_agree(computed_fused(fused), expected_fused(fused))


@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}, {"shapes": []}, {"points": 0}])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(kernels, empty):
    case = make_fused_case(**empty, coordinates=4, masked=True)
    assert not any(result.any() for result in computed_fused(case))


# ---- types ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(kernels, dtype):
    case = make_case(dtype)
    half = [x.to(dtype) if x.is_floating_point() else x for x in case.inputs]
    out = ms_deform_attn(*half)
    assert out.dtype == dtype
    wide = ms_deform_attn(*(x.float() if x.is_floating_point() else x for x in half))
    assert_agree((out,), (wide.double(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_types_of_their_inputs(kernels, dtype):
    case = make_fused_case(dtype, coordinates=4, masked=True)
    case = case._replace(offsets=case.offsets.to(dtype), logits=case.logits.to(dtype))
    types = [x.dtype for x in computed_fused(case)]
    assert types == [dtype, dtype, torch.float32, dtype, dtype]


def test_autocast_keeps_locations_in_float32(kernels):
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ms_deform_attn(*case.inputs)
    torch.testing.assert_close(out, ms_deform_attn(*case.inputs), rtol=0, atol=0)


# ---- the compiler ----

SMALL = dict(shapes=[(3, 4), (1, 2)], batch=1, queries=2, heads=2, dim=4, points=2)


def _requiring_gradients(inputs):
    return tuple(
        x.requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs
    )


@pytest.mark.parametrize("masked", [False, True])
def test_operators_are_well_formed_for_the_compiler(kernels, masked):
    case = make_case(**SMALL)
    fused = make_fused_case(**SMALL, coordinates=4, masked=masked)
    opcheck, operators = torch.library.opcheck, torch.ops.dn_detr
    opcheck(operators.ms_deform_attn.default, _requiring_gradients(case.inputs))
    opcheck(operators.ms_deform_attn_fused.default, _requiring_gradients(fused.inputs))
    opcheck(operators.ms_deform_attn_backward.default, (case.grad_output, *make_case(**SMALL)[:5]))
    plain = make_fused_case(**SMALL, coordinates=4, masked=masked).inputs
    opcheck(operators.ms_deform_attn_fused_backward.default, (case.grad_output, *plain))


@pytest.fixture
def attention():
    """A module with random weights, and its inputs."""
    torch.manual_seed(0)
    module = MSDeformAttn(32, 4, 3, 2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shapes = torch.tensor(SHAPES)
    sizes = shapes.prod(1)
    memory = torch.randn(2, int(sizes.sum()), 32)
    mask = torch.zeros(2, int(sizes.sum()), dtype=torch.bool)
    mask[1, -5:] = True
    references = torch.rand(2, 7, 3, 4)
    inputs = (torch.randn(2, 7, 32), references, memory, shapes, sizes.cumsum(0) - sizes, mask)
    return module, inputs


def test_module_compiles_without_graph_breaks(kernels, attention):
    module, inputs = attention
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out, again = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(again, out)
    gradients, others = (
        torch.autograd.grad(x.square().sum(), tuple(module.parameters())) for x in (out, again)
    )
    torch.testing.assert_close(others, gradients)


def test_module_is_exported_for_any_number_of_queries(kernels, attention):
    module, inputs = attention
    queries = torch.export.Dim("queries", min=2, max=1000)
    dynamic = ({1: queries}, {1: queries}, None, None, None, None)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic)
    more = (torch.randn(2, 11, 32), torch.rand(2, 11, 3, 4), *inputs[2:])
    torch.testing.assert_close(program.module()(*more), module(*more))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_module_under_autocast_is_near_float32(kernels, attention, dtype):
    module, inputs = attention
    with torch.autocast("cpu", dtype=dtype):
        out = module(*inputs)
    assert out.dtype == dtype
    error = (out.float() - module(*inputs)).abs().max() / module(*inputs).abs().max()
    assert error < (0.005 if dtype == torch.float16 else 0.04)
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


# ---- the choice of kernels ----


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As after an installation that built nothing."""
    caches = (library.load, library.missing_kernels, library._warn_once)
    monkeypatch.setattr(library, "CPU_LIBRARY", tmp_path / "_C.so")
    for function in caches:
        function.cache_clear()
    yield tmp_path / "_C.so"
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


def test_a_missing_library_is_told_once_and_computed_without(no_library):
    case = make_case()
    with pytest.warns(UserWarning, match=r"cpu uses slow .* because the installation built no _C"):
        assert_agree(computed(case), expected(case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        computed(case)


def test_the_reason_for_a_missing_library_is_told(no_library):
    no_library.with_suffix(".missing.txt").write_text("no C++ compiler was found\n")
    with pytest.warns(UserWarning, match=r"built no _C\.so: no C\+\+ compiler was found"):
        ms_deform_attn(*make_case().inputs)


def test_a_library_that_cannot_be_loaded_is_told(no_library):
    no_library.write_bytes(b"no library")
    with pytest.warns(UserWarning, match="cannot be loaded"):
        ms_deform_attn(*make_case().inputs)


def test_a_wish_for_pytorch_is_no_reason_to_warn(no_library):
    with use_kernels("pytorch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        ms_deform_attn(*make_case().inputs)


def test_unknown_kernels_are_refused(monkeypatch):
    message = "no kernels 'cuda'; choose one of auto, pytorch"
    with pytest.raises(ValueError, match=message), use_kernels("cuda"):
        pass
    monkeypatch.setattr(library, "_chosen", "fast")  # as DN_DETR_KERNELS=fast does
    with pytest.raises(ValueError, match="no kernels 'fast'"):
        ms_deform_attn(*make_case().inputs)
