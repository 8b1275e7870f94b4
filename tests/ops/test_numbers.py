"""Outputs and gradients of the operators against float64, for all kernels that there are.

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dn_detr.ops import ms_deform_attn, ms_deform_attn_fused

from .cases import (
    FEW,
    MANY,
    NOT_INSIDE,
    TYPES,
    assert_near,
    assert_same_bits,
    computed,
    expected,
    make_case,
    strided,
)
from .conftest import INSTRUCTION_SETS

# The ones of csrc/; each processor has some of the instruction sets.
COMPILED = pytest.mark.parametrize("kernels", [*INSTRUCTION_SETS, "emulated"], indirect=True)


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


def test_output_is_the_definition(kernels):
    case = make_case(torch.float64, dim=4, points=3)
    torch.testing.assert_close(ms_deform_attn(*case.arguments), _direct(*case.arguments))


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_results_are_those_of_float64(kernels, dtype, coordinates, queries):
    for masked in {False, coordinates > 0}:
        case = make_case(dtype, queries=queries, coordinates=coordinates, masked=masked)
        results = computed(case)
        assert [x.dtype for x in results.values()][1:] == [x.dtype for x in case.leaves.values()]
        assert results["output"].dtype == dtype
        assert_near(results, expected(case))


@COMPILED
@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 20, 24, 36, 48, 64, 68, 100, 128, 256])
def test_every_head_dim(kernels, dim, queries):
    for case in (
        make_case(dim=dim, queries=queries),
        make_case(torch.bfloat16, dim=dim, queries=queries, coordinates=2, masked=True),
    ):
        assert_near(computed(case), expected(case))


@pytest.mark.parametrize("dim", [1, 6, 260])
def test_head_dims_without_kernels_are_computed_all_the_same(dim):
    case = make_case(dim=dim, coordinates=2, masked=True)
    assert_near(computed(case), expected(case))


@COMPILED
@pytest.mark.parametrize("points", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("levels", [1, 2, 5, 9, 17])
def test_every_number_of_levels_and_points(kernels, levels, points):
    shapes = [(9 - i // 2, 1 + i) for i in range(levels)]
    for coordinates in (2, 4):
        case = make_case(
            shapes=shapes, points=points, queries=9, batch=1, coordinates=coordinates, dim=4
        )
        assert_near(computed(case), expected(case))


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_levels_without_cells_read_zeros(kernels, queries):
    case = make_case(shapes=[(0, 3), (4, 5), (2, 0), (0, 0)], queries=queries)
    assert_near(computed(case), expected(case))


@pytest.mark.parametrize("coordinates", [0, 2])
@pytest.mark.parametrize(
    "empty",
    [
        {"batch": 0},
        {"queries": 0},
        {"heads": 0},
        {"points": 0},
        {"shapes": []},
        {"dim": 0},
        {"shapes": [(0, 3), (2, 0)]},
    ],
    ids=str,
)
def test_empty_inputs_give_zeros(kernels, empty, coordinates):
    case = make_case(**empty, coordinates=coordinates, masked=True)
    results = computed(case)
    assert results["output"].shape == case.grad_output.shape
    for name, result in results.items():
        assert not result.any()
        assert name == "output" or result.shape == case[name].shape


ORDERS = {
    "heads first": {4: (2, 0, 1, 3), 6: (2, 0, 1, 3, 4, 5), 5: (2, 0, 1, 3, 4), 3: (1, 0, 2)},
    "all reversed": {4: (3, 2, 1, 0), 6: (5, 4, 3, 2, 1, 0), 5: (4, 3, 2, 1, 0), 3: (2, 1, 0)},
    "queries first": {4: (1, 0, 2, 3), 6: (1, 0, 2, 3, 4, 5), 5: (1, 2, 0, 3, 4), 3: (1, 0, 2)},
}


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("coordinates", [0, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_strides_change_nothing(kernels, order, coordinates, queries):
    case = make_case(queries=queries, coordinates=coordinates, masked=True)
    orders = {**ORDERS[order], 2: (1, 0), 1: (0,)}
    views = {k: strided(x, orders[x.dim()]) for k, x in case.inputs.items() if x is not None}
    views["level_start_index"] = torch.stack([case["level_start_index"]] * 2, 1)[:, 0]
    view = replace(case.changed(**views), grad_output=strided(case.grad_output, orders[3]))
    assert not any(x.is_contiguous() for x in (*views.values(), view.grad_output))
    if kernels == "pytorch":  # grid_sample adds in another order
        assert_near(computed(view), expected(case))
    else:
        assert_same_bits(computed(view), computed(case))


def test_views_that_start_anywhere_change_nothing(kernels):
    """Nothing but the element's own alignment: vectors cannot be loaded from such addresses."""
    case = make_case(coordinates=2, masked=True)

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    views = {k: shifted(x) for k, x in case.inputs.items() if x is not None}
    view = replace(case.changed(**views), grad_output=shifted(case.grad_output))
    assert_same_bits(computed(view), computed(case))


def test_expanded_inputs_are_read_in_place(kernels):
    case = make_case(coordinates=2, masked=True, queries=MANY)
    references, mask = case["reference_points"], case["padding_mask"]
    case = replace(
        case.changed(
            reference_points=references[:1, :, :1].expand_as(references),
            padding_mask=mask[:1].expand_as(mask),
        ),
        grad_output=torch.ones(()).expand_as(case.grad_output),
    )
    dense = {k: case[k].contiguous() for k in ("reference_points", "padding_mask")}
    dense_case = replace(case.changed(**dense), grad_output=case.grad_output.contiguous())
    assert_same_bits(computed(case), computed(dense_case))


# ---- what is not finite, and what lies outside ----


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("number", NOT_INSIDE)
def test_locations_that_are_not_finite_sample_zero(kernels, number, queries):
    case = make_case(queries=queries)
    locations = case["sampling_locations"].clone()
    locations[:, ::2, ..., 1, 0] = number
    locations[:, ::2, ..., 2, 1] = number
    weights = case["attention_weights"].clone()
    weights[:, ::2, ..., 1:3] = 0
    results = computed(case.changed(sampling_locations=locations))
    without = computed(case.changed(attention_weights=weights))
    assert_same_bits(
        {k: results[k] for k in ("output", "value")}, {k: without[k] for k in ("output", "value")}
    )
    assert not results["sampling_locations"][:, ::2, ..., 1:3, :].any()
    assert not results["attention_weights"][:, ::2, ..., 1:3].any()


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("number", NOT_INSIDE)
def test_offsets_that_are_not_finite_sample_zero(kernels, number, coordinates):
    case = make_case(coordinates=coordinates)
    offsets = case["offsets"].clone()
    offsets[:, ::2, ..., 1, :] = number
    outside = case["offsets"].clone()
    outside[:, ::2, ..., 1, :] = 1e5
    results = computed(case.changed(offsets=offsets))
    others = computed(case.changed(offsets=outside))
    same = ("output", "value", "logits", "offsets", "reference_points")
    assert_same_bits({k: results[k] for k in same}, {k: others[k] for k in same})


@COMPILED
@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_cells_without_weight_may_be_anything(kernels, number, queries):
    # Query 0 samples the centre of cell (1, 1), where the other three corners weigh nothing; the
    # last one gives a cell that is not finite no attention. Sizes are powers of two: exact.
    case = make_case(shapes=[(4, 8)], points=1, queries=queries)
    case["sampling_locations"][:] = (torch.tensor([1.0, 1.0]) + 0.5) / torch.tensor([8.0, 4.0])
    last = (torch.tensor([5.2, 2.3]) + 0.5) / torch.tensor([8.0, 4.0])
    case["sampling_locations"][:, -1] = last
    case["attention_weights"][:, -1] = 0
    value = case["value"].clone()
    value[:, [10, 17, 18, 21, 22, 29, 30]] = number
    clean, poisoned = computed(case), computed(case.changed(value=value))
    for results in (clean, poisoned):
        del results["sampling_locations"]  # these do depend on the neighbours
        results["attention_weights"] = results["attention_weights"][:, :-1]
    assert_same_bits(poisoned, clean)


@COMPILED
@pytest.mark.parametrize("queries", [FEW, MANY])
def test_cells_that_are_not_finite_reach_the_queries_that_read_them(kernels, queries):
    case = make_case(queries=queries)
    case["value"][0, 3] = float("nan")
    marks = case.changed(value=case["value"].isnan().float())
    assert torch.equal(computed(case)["output"].isnan(), expected(marks)["output"] != 0)


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_masked_cells_read_as_zeros_whatever_they_are(kernels, queries):
    case = make_case(coordinates=2, masked=True, queries=queries)
    clean = computed(case)
    case["value"][case["padding_mask"]] = float("nan")
    assert_same_bits(computed(case), clean)
    assert not clean["value"][case["padding_mask"]].any()


@pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)
def test_cells_after_a_long_column_are_not_read(kernels):
    """The longest side, where float32 counts just to the last row; one row more lies behind it."""
    height = 2**24
    memory = torch.zeros(1, height + 8, 1, 4)
    memory[:, height:] = 1e30
    locations = torch.full((1, 8, 1, 1, 1, 2), 0.5)
    y = torch.tensor(1.0)
    for query in range(8):
        locations[:, query, ..., 1] = y
        y = torch.nextafter(y, torch.tensor(0.0))
    shapes, starts = torch.tensor([[height, 1]]), torch.tensor([0])
    out = ms_deform_attn(memory[:, :height], shapes, starts, locations, torch.ones(1, 8, 1, 1, 1))
    assert not out.any()


# ---- finite differences ----


def _gradcheck(case) -> bool:
    operator = ms_deform_attn_fused if case.is_fused else ms_deform_attn
    arguments = [
        x.requires_grad_() if x is not None and x.is_floating_point() else x
        for x in case.arguments
    ]  # fmt: skip
    return torch.autograd.gradcheck(operator, arguments)


@pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)
@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("queries", [2, 8])
def test_gradients_are_finite_differences(kernels, coordinates, queries):
    case = make_case(
        torch.float64, shapes=[(3, 4), (1, 2)], batch=1, queries=queries, heads=1, dim=4, points=2,
        coordinates=coordinates, masked=True,
    )  # fmt: skip
    assert _gradcheck(case)


@pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)
@pytest.mark.parametrize("queries", [2, 8])
def test_gradients_on_borders_and_outside_are_finite_differences(kernels, queries):
    case = make_case(
        torch.float64, shapes=[(3, 4), (1, 2)], batch=1, queries=queries, heads=1, dim=4, points=4
    )
    locations = case["sampling_locations"]
    locations[..., 0, :] = torch.tensor([0.0, 1.0])  # corners of the map
    locations[..., 1, :] = torch.tensor([1.0, 0.4])
    locations[..., 2, :] = torch.tensor([-0.05, 1.05])  # half outside
    locations[..., 3, :] = torch.tensor([3.0, 0.4])  # out of reach
    assert _gradcheck(case)
    assert not computed(case)["sampling_locations"][..., 3, :].any()


# ---- anything ----


@pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=5),
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "queries": st.integers(0, 40),
            "heads": st.integers(1, 3),
            "dim": st.integers(1, 20).map(lambda n: 4 * n),
            "points": st.integers(1, 6),
            "coordinates": st.sampled_from([0, 2, 4]),
            "masked": st.booleans(),
            "seed": st.integers(0, 1000),
        }
    ),
    dtype=st.sampled_from(TYPES),
    order=st.sampled_from([None, *ORDERS]),
)
def test_any_shape_type_and_strides(kernels, shapes, sizes, dtype, order):
    case = make_case(dtype, shapes=shapes, **sizes)
    reference = expected(case)
    if order is not None:
        case = case.changed(
            **{k: strided(x, ORDERS[order][x.dim()]) for k, x in case.leaves.items()}
        )
    assert_near(computed(case), reference)
