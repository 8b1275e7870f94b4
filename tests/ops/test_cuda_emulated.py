"""The CUDA kernels and their binding, run on the CPU by a small launch emulator (emulator/).

The same sources are compiled by a C++ compiler and registered for CPU tensors as the library
``dn_detr_emulated``. What they compute is compared with float64 of the Python operator.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dn_detr.ops import ms_deform_attn

from .emulator.building import library_path

pytestmark = pytest.mark.slow  # compiling the kernels takes most of the time

SMALL = ((5, 7), (3, 4), (1, 2))
DECODER = ((100, 134), (50, 67), (25, 34), (13, 17))
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
OUTSIDE = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e38)


@pytest.fixture
def shuffle(emulated: Any) -> Any:
    """A function that draws the order of blocks and threads from a seed; undone afterwards."""
    function = ctypes.CDLL(str(library_path())).dn_detr_emulator_shuffle
    yield function
    function(0)


# ---- Inputs and references ----------------------------------------------------------------------


class Case(NamedTuple):
    """Sizes of a problem; ``reference`` is 0 for the classic operator, else coordinates."""

    dim: int = 32
    reference: int = 0
    mask: bool = False
    batch: int = 2
    heads: int = 2
    queries: int = 5
    points: int = 3
    shapes: tuple[tuple[int, int], ...] = SMALL


def _inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
    """Arguments of the classic or fused operator; some samples lie outside."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(case.shapes, dtype=torch.int64).reshape(-1, 2)
    sizes = shapes.prod(1)
    levels, cells = len(case.shapes), int(sizes.sum())
    real = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(case.batch, cells, case.heads, case.dim, generator=generator).to(dtype)
    grid = (case.batch, case.queries, case.heads, levels, case.points)
    common: list[Tensor | None] = [value, shapes, sizes.cumsum(0) - sizes]
    if not case.reference:
        locations = torch.rand(*grid, 2, generator=generator) * 1.6 - 0.3
        return [*common, locations.to(real), torch.rand(grid, generator=generator).to(real)]
    references = torch.rand(*grid[:2], levels, case.reference, generator=generator)
    offsets = torch.randn(*grid, 2, generator=generator) * 2
    logits = torch.randn(*grid[:3], levels * case.points, generator=generator)
    mask = torch.rand(case.batch, cells, generator=generator) < 0.2 if case.mask else None
    return [*common, references.to(real), offsets.to(real), logits.to(real), mask]


def _fused(value, shapes, starts, references, offsets, logits, mask) -> Tensor:
    """The fused operator from the classic one, as the attention layer computes it."""
    if mask is not None:
        value = value.masked_fill(mask[..., None, None], 0.0)
    levels, points = offsets.shape[3:5]
    weights = logits.softmax(-1).unflatten(-1, (levels, points))
    references = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        locations = references + offsets / shapes.flip(-1)[:, None]
    else:
        locations = references[..., :2] + offsets / points * references[..., 2:] * 0.5
    return ms_deform_attn(value, shapes, starts, locations, weights)


def _expected(inputs: list[Tensor | None], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the floating-point arguments, in float64."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    leaves = [x.requires_grad_() for x in wide if x is not None and x.is_floating_point()]
    out = _fused(*wide) if len(inputs) == 7 else ms_deform_attn(*wide)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.double()))


def _forward(emulated: Any, inputs: list[Tensor | None]) -> Tensor:
    name = "ms_deform_attn_fused_forward" if len(inputs) == 7 else "ms_deform_attn_forward"
    return getattr(emulated, name)(*inputs)


def _backward(
    emulated: Any, inputs: list[Tensor | None], grad: Tensor, *, deterministic: bool = False
) -> list[Tensor]:
    name = "ms_deform_attn_fused_backward" if len(inputs) == 7 else "ms_deform_attn_backward"
    name += "_deterministic" if deterministic else ""
    return list(getattr(emulated, name)(grad, *inputs))


def _grad(inputs: list[Tensor | None], seed: int = 1) -> Tensor:
    """A gradient of the output."""
    value, queries = inputs[0], inputs[-2 if len(inputs) == 5 else -3].shape[1]
    generator = torch.Generator().manual_seed(seed)
    size = (value.shape[0], queries, value.shape[2] * value.shape[3])
    return torch.randn(size, generator=generator).to(value.dtype)


def _assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest expected number, and equal where that is not finite."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


def _check(emulated: Any, inputs: list[Tensor | None]) -> None:
    """Forward, backward and deterministic backward are near float64."""
    tolerance = TOLERANCE[inputs[0].dtype]
    grad = _grad(inputs)
    out, gradients = _expected(inputs, grad)
    _assert_near(_forward(emulated, inputs), out, tolerance)
    for deterministic in (False, True):
        actual = _backward(emulated, inputs, grad, deterministic=deterministic)
        leaves = [x for x in inputs if x is not None and x.is_floating_point()]
        for got, wanted, leaf in zip(actual, gradients, leaves, strict=True):
            assert got.dtype == leaf.dtype
            # Coordinates, weights and their gradients are never in half precision.
            _assert_near(got, wanted, tolerance if got.dtype == inputs[0].dtype else 1e-5)


# ---- Values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [4, 16, 20, 32, 40, 64, 96, 256])
def test_classic_operator_is_near_float64(emulated, dtype, dim):
    _check(emulated, _inputs(Case(dim=dim), dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 20, 32, 64])
@pytest.mark.parametrize("reference", [2, 4])
@pytest.mark.parametrize("mask", [False, True])
def test_fused_operator_is_near_float64(emulated, dtype, dim, reference, mask):
    _check(emulated, _inputs(Case(dim=dim, reference=reference, mask=mask), dtype))


@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_decoder_is_near_float64(emulated, dtype, reference):
    case = Case(32, reference, bool(reference), 1, heads=8, queries=500, points=4, shapes=DECODER)
    _check(emulated, _inputs(case, dtype))


@pytest.mark.parametrize("reference", [0, 2, 4])
def test_gradients_are_finite_differences(emulated, reference):
    inputs = _inputs(Case(dim=4, reference=reference, batch=1, queries=2), torch.float64)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return _forward(emulated, list(inputs))

        @staticmethod
        def backward(ctx, grad):
            gradients = _backward(emulated, list(ctx.saved_tensors), grad)
            padding = (None,) if len(ctx.saved_tensors) == 7 else ()
            return (gradients[0], None, None, *gradients[1:], *padding)

    for x in inputs:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    assert torch.autograd.gradcheck(Operator.apply, inputs)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.builds(
        Case,
        dim=st.sampled_from([4, 8, 12, 16, 32, 36, 64]),
        reference=st.sampled_from([0, 2, 4]),
        mask=st.booleans(),
        batch=st.integers(1, 3),
        heads=st.integers(1, 5),
        queries=st.integers(0, 40),
        points=st.integers(1, 9),
        shapes=st.lists(
            st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=20
        ).map(tuple),
    ),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
)
def test_any_sizes_are_near_float64(emulated, case, dtype, seed):
    _check(emulated, _inputs(case, dtype, seed))


@pytest.mark.parametrize("reference", [0, 2])
def test_strided_inputs_are_read_in_place_or_copied(emulated, reference):
    inputs = _inputs(Case(reference=reference, mask=bool(reference)), torch.float32)
    grad = _grad(inputs)

    def strided(x, pad):
        """The same numbers, with gaps, and for some strides no vector can be loaded from."""
        if x is None or not x.dtype.is_floating_point:
            return x
        gaps = torch.full((*x.shape[:-1], x.shape[-1] + pad), float("nan"), dtype=x.dtype)
        gaps[..., pad:] = x
        return gaps[..., pad:]

    for pad in (1, 4):
        views = [strided(x, pad) for x in inputs]
        views[0] = views[0].transpose(1, 2).contiguous().transpose(1, 2) if pad == 4 else views[0]
        expected = [_forward(emulated, inputs), *_backward(emulated, inputs, grad)]
        actual = [
            _forward(emulated, views),
            *_backward(emulated, views, strided(grad, pad)),
        ]
        for got, wanted in zip(actual, expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("reference", [0, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_order_of_threads_changes_nothing_but_atomic_sums(emulated, shuffle, dtype, reference):
    inputs = _inputs(Case(reference=reference, mask=True, queries=70), dtype)
    grad = _grad(inputs)

    def run(seed):
        shuffle(seed)
        out = _forward(emulated, inputs)
        fast = _backward(emulated, inputs, grad)
        return [out, *fast[1:], *_backward(emulated, inputs, grad, deterministic=True)]

    first = run(0)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, run(seed), first))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_deterministic_gradients_keep_their_digits_at_any_scale(emulated, scale):
    inputs = _inputs(Case(), torch.float32)
    grad = _grad(inputs) * scale
    _, (expected, *_) = _expected(inputs, grad)
    actual = _backward(emulated, inputs, grad, deterministic=True)[0]
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=1e-5)


def test_deterministic_backward_of_zeros_is_zero(emulated):
    inputs = _inputs(Case(), torch.float32)
    grad = torch.zeros_like(_grad(inputs))
    assert not any(x.any() for x in _backward(emulated, inputs, grad, deterministic=True))


# ---- What is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize("bad", OUTSIDE)
@pytest.mark.parametrize("deterministic", [False, True])
def test_location_that_is_not_finite_samples_zero(emulated, reference, bad, deterministic):
    inputs = _inputs(Case(reference=reference), torch.float32)
    outside = [x.clone() if x is not None else None for x in inputs]
    points = 4 if reference else 3  # offsets or locations
    spoilt = [x.clone() if x is not None else None for x in inputs]
    spoilt[points][0, 1, :, 1, 2, 0] = bad
    outside[points][0, 1, :, 1, 2, 0] = 1e4
    grad = _grad(inputs)
    assert torch.equal(_forward(emulated, spoilt), _forward(emulated, outside))
    for got, wanted in zip(
        _backward(emulated, spoilt, grad, deterministic=deterministic),
        _backward(emulated, outside, grad, deterministic=deterministic),
        strict=True,
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("reference", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cells_without_weight_do_not_leak(emulated, reference, bad):
    """Samples at cell centres give no weight to the neighbours; masked cells count as zeros."""
    shapes = ((4, 4),)
    case = Case(reference=reference, mask=bool(reference), batch=1, points=2, shapes=shapes)
    inputs = _inputs(case, torch.float32)
    value = inputs[0]
    value[:, 6] = bad  # row 1, column 2
    if reference:
        inputs[6][:] = False
        inputs[6][:, 6] = True
        finite = value.clone()
        finite[:, 6] = 0
    else:
        centre = torch.tensor([1.5 / 4, 1.5 / 4])  # column 1: column 2 gets a zero share
        inputs[3][:] = centre
        finite = value.clone()
        finite[:, 6] = 7
    grad = _grad(inputs)
    clean = [finite, *inputs[1:]]
    assert torch.equal(_forward(emulated, inputs), _forward(emulated, clean))
    gradients = _backward(emulated, inputs, grad)
    expected = _backward(emulated, clean, grad)
    kept = range(len(gradients)) if reference else (0, 2)  # locations do depend on neighbours
    for index in kept:
        assert torch.equal(gradients[index], expected[index])


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_that_are_not_finite_reach_only_what_they_touch(emulated, deterministic):
    inputs = _inputs(Case(), torch.float32)
    grad = _grad(inputs)
    grad[1, 2, 3] = float("nan")
    value_grad, *_ = _backward(emulated, inputs, grad, deterministic=deterministic)
    bad = value_grad.isnan()
    assert bad[1, :, 0, 3].any()
    bad[1, :, 0, 3] = False
    assert not bad.any()


# ---- Edges and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [0, 2])
@pytest.mark.parametrize(
    "sizes",
    [dict(queries=0), dict(batch=0), dict(heads=0), dict(points=0), dict(shapes=()),
     dict(shapes=((0, 3), (2, 0)))],
)  # fmt: skip
def test_empty_inputs_give_zeros(emulated, reference, sizes):
    inputs = _inputs(Case(reference=reference, mask=bool(reference))._replace(**sizes),
                     torch.float32)  # fmt: skip
    grad = _grad(inputs)
    out = _forward(emulated, inputs)
    assert out.shape == grad.shape and not out.any()
    leaves = [x for x in inputs if x is not None and x.is_floating_point()]
    for deterministic in (False, True):
        gradients = _backward(emulated, inputs, grad, deterministic=deterministic)
        for got, leaf in zip(gradients, leaves, strict=True):
            assert got.shape == leaf.shape and not got.any()


def test_empty_levels_beside_others_read_nothing(emulated):
    inputs = _inputs(Case(shapes=((0, 3), (3, 4), (2, 0))), torch.float32)
    value, shapes, starts, locations, weights = inputs
    middle = [value, shapes[1:2], starts[1:2], locations[:, :, :, 1:2], weights[:, :, :, 1:2]]
    assert torch.equal(_forward(emulated, inputs), _forward(emulated, middle))
    grad = _grad(inputs)
    whole, part = _backward(emulated, inputs, grad), _backward(emulated, middle, grad)
    assert torch.equal(whole[0], part[0])
    for got, wanted in zip(whole[1:], part[1:], strict=True):
        assert torch.equal(got[:, :, :, 1:2], wanted)
        assert not got[:, :, :, ::2].any()


def test_gradient_of_the_output_must_fit(emulated):
    inputs = _inputs(Case(), torch.float32)
    with pytest.raises(ValueError, match="grad_output has the shape"):
        _backward(emulated, inputs, _grad(inputs)[:, :-1])


@pytest.mark.parametrize("reference", [0, 2, 4])
def test_levels_that_do_not_fit_the_launch_are_read_from_a_table(emulated, reference):
    shapes = tuple((1 + i % 3, 1 + i % 4) for i in range(17))
    _check(emulated, _inputs(Case(4, reference, shapes=shapes), torch.float32))


@pytest.mark.parametrize("reference", [0, 2])
def test_far_cells_of_a_large_map_keep_their_digits(emulated, reference):
    case = Case(4, reference, False, 1, 1, 40, 4, ((1, 20_000),))
    inputs = _inputs(case, torch.float32)
    inputs[3][..., 0] = 0.9 + inputs[3][..., 0] * 0.05
    inputs[3][..., 1] = 0.5
    if reference:
        inputs[4][..., 1] = 0
    _assert_near(_forward(emulated, inputs), _expected(inputs, _grad(inputs))[0], 1e-5)


@pytest.mark.parametrize("points", [1, 7, 1000])
def test_any_number_of_points_finds_its_level(emulated, points):
    shapes = ((2, 3), (1, 1), (3, 2))
    _check(emulated, _inputs(Case(4, 0, False, 1, 1, 1, points, shapes), torch.float32))


def test_too_many_points_are_named(emulated):
    inputs = _inputs(Case(4, 0, False, 1, 1, 1, 30_000, SMALL), torch.float32)
    with pytest.raises(ValueError, match="sampling_locations has too many points: 30000"):
        _forward(emulated, inputs)
