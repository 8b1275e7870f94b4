"""The deformable-attention operator against a direct formula, finite differences and opcheck."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dn_detr.ops import ms_deform_attn

SHAPES = [(5, 7), (3, 4), (1, 2)]


def _inputs(
    dtype: torch.dtype = torch.float64, *, batch: int = 2, queries: int = 3
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, dim, points = 2, 4, 3
    shapes = torch.tensor(SHAPES)
    sizes = shapes.prod(1)
    value = torch.randn(batch, int(sizes.sum()), heads, dim, generator=generator)
    # Locations from -0.3 to 1.3: some samples lie outside, some on the border.
    grid = (batch, queries, heads, len(SHAPES), points)
    locations = torch.rand(*grid, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(grid, generator=generator)
    floats = [x.to(dtype) for x in (value, locations, weights)]
    return [floats[0], shapes, sizes.cumsum(0) - sizes, floats[1], floats[2]]


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


def test_forward_is_the_definition():
    inputs = _inputs()
    torch.testing.assert_close(ms_deform_attn(*inputs), _direct(*inputs))


def test_gradients_are_finite_differences():
    inputs = _inputs()
    for index in (0, 3, 4):
        inputs[index].requires_grad_()
    assert torch.autograd.gradcheck(ms_deform_attn, inputs)


def test_operator_is_well_formed_for_the_compiler():
    inputs = _inputs(torch.float32)
    for index in (0, 3, 4):
        inputs[index].requires_grad_()
    torch.library.opcheck(torch.ops.dn_detr.ms_deform_attn.default, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    inputs = _inputs(dtype)
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    out = ms_deform_attn(*inputs)
    assert out.dtype == dtype
    torch.testing.assert_close(out, ms_deform_attn(*wide).to(dtype), rtol=0, atol=0)


def test_autocast_keeps_locations_in_float32():
    inputs = _inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ms_deform_attn(*inputs)
    torch.testing.assert_close(out, ms_deform_attn(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(batch, queries):
    inputs = _inputs(batch=batch, queries=queries)
    inputs[0].requires_grad_()
    out = ms_deform_attn(*inputs)
    assert out.shape == (batch, queries, 8)
    out.sum().backward()
    assert inputs[0].grad is not None and not inputs[0].grad.any()


@pytest.mark.parametrize(
    ("index", "change", "complaint"),
    [
        (1, lambda x: x + 1, "add up"),
        (2, lambda x: x + 1, "level_start_index"),
        (3, lambda x: x[:, :, :1], "sampling_locations"),
        (4, lambda x: x[..., :1], "attention_weights"),
    ],
)
def test_shapes_that_do_not_fit_are_named(index, change, complaint):
    inputs = _inputs()
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=complaint):
        ms_deform_attn(*inputs)
