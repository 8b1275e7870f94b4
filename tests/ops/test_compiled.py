"""The compiled CPU operators against grid_sample in float64, for every instruction set here.

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dn_detr.ops import missing_kernels

from .cases import (
    DTYPES,
    FEW,
    MANY,
    Case,
    FusedCase,
    assert_agree,
    assert_same_bits,
    expected,
    expected_fused,
    make_case,
    make_fused_case,
    reference_forward,
    strided,
)

if (problem := missing_kernels("cpu")) is not None:
    pytest.skip(problem, allow_module_level=True)
COMPILED = torch.ops.dn_detr_C


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = COMPILED.cpu_kernels()
    try:
        COMPILED.use_cpu_kernels(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    COMPILED.use_cpu_kernels(before)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def computed(case: Case) -> tuple[Tensor, ...]:
    return (
        COMPILED.ms_deform_attn_forward(*case.inputs),
        *COMPILED.ms_deform_attn_backward(case.grad_output, *case.inputs),
    )


def computed_fused(case: FusedCase) -> tuple[Tensor, ...]:
    return (
        COMPILED.ms_deform_attn_fused_forward(*case.inputs),
        *COMPILED.ms_deform_attn_fused_backward(case.grad_output, *case.inputs),
    )


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_float64(instruction_set, dtype, queries):
    case = make_case(dtype, queries=queries)
    assert_agree(computed(case), expected(case))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_results_are_those_of_float64(instruction_set, dtype, queries, coordinates, masked):
    case = make_fused_case(dtype, queries=queries, coordinates=coordinates, masked=masked)
    assert_agree(computed_fused(case), expected_fused(case))


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 20, 24, 36, 48, 64, 68, 100, 128, 256])
def test_every_head_dim(instruction_set, dim, queries):
    case = make_case(dim=dim, queries=queries)
    assert_agree(computed(case), expected(case))
    fused = make_fused_case(torch.bfloat16, dim=dim, queries=queries, coordinates=2, masked=True)
    assert_agree(computed_fused(fused), expected_fused(fused))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("points", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("levels", [1, 2, 5, 9])
def test_every_number_of_levels_and_points(instruction_set, levels, points, coordinates):
    shapes = [(6 - i // 2, 1 + i) for i in range(levels)]
    case = make_fused_case(
        shapes=shapes, points=points, queries=20, coordinates=coordinates, masked=False
    )
    assert_agree(computed_fused(case), expected_fused(case))


def test_levels_without_cells_read_zeros(instruction_set):
    for queries in (FEW, MANY):
        case = make_case(shapes=[(0, 3), (4, 5), (2, 0), (0, 0)], queries=queries)
        assert_agree(computed(case), expected(case))


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"points": 0}, {"shapes": []}, {"dim": 0}]
)
def test_empty_inputs_give_zeros(empty):
    case = make_case(**empty)
    for result in computed(case):
        assert not result.any()
    assert [x.shape for x in computed(case)[1:]] == [case[i].shape for i in (0, 3, 4)]
    fused = make_fused_case(**empty, coordinates=2, masked=True)
    for result in computed_fused(fused):
        assert not result.any()


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("order", ["heads first", "innermost last", "queries first"])
def test_strided_inputs(order, queries):
    case = make_case(queries=queries)
    orders = {
        "heads first": ((2, 0, 1, 3), (2, 0, 1, 3, 4, 5), (2, 0, 1, 3, 4), (1, 0, 2)),
        "innermost last": ((3, 2, 1, 0), (5, 4, 3, 2, 1, 0), (4, 3, 2, 1, 0), (2, 1, 0)),
        "queries first": ((1, 0, 2, 3), (1, 0, 2, 3, 4, 5), (1, 2, 0, 3, 4), (1, 0, 2)),
    }[order]
    value, locations, weights, grad_output = (
        strided(case[i], o) for i, o in zip((0, 3, 4, 5), orders, strict=True)
    )
    shapes = case.spatial_shapes.t().contiguous().t()
    starts = torch.stack([case.level_start_index] * 2, 1)[:, 0]
    other = Case(value, shapes, starts, locations, weights, grad_output)
    assert_same_bits(computed(other), computed(case))


def test_expanded_inputs():
    case = make_fused_case(coordinates=2, masked=True, queries=MANY)
    case = case._replace(
        reference_points=case.reference_points[:1, :, :1].expand_as(case.reference_points),
        padding_mask=case.padding_mask[:1].expand_as(case.padding_mask),
        grad_output=torch.ones(()).expand_as(case.grad_output),
    )
    dense = case._replace(
        **{k: getattr(case, k).contiguous() for k in ("reference_points", "padding_mask")},
        grad_output=case.grad_output.contiguous(),
    )
    assert_same_bits(computed_fused(case), computed_fused(dense))


@pytest.mark.parametrize("queries", [FEW, MANY, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(threads, dtype, queries):
    case = make_case(dtype, queries=queries)
    fused = [make_fused_case(dtype, queries=queries, coordinates=n, masked=True) for n in (2, 4)]
    threads(1)
    alone = computed(case), *map(computed_fused, fused)
    for count in (2, 3, 5, 40):
        threads(count)
        together = computed(case), *map(computed_fused, fused)
        for results, others in zip(together, alone, strict=True):
            assert_same_bits(results, others)


NOT_INSIDE = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9]


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("number", NOT_INSIDE)
@pytest.mark.parametrize("coordinate", [0, 1])
def test_locations_that_are_not_finite_sample_zero(instruction_set, number, coordinate, queries):
    case = make_case(queries=queries)
    case.locations[:, ::2, ..., 1, coordinate] = number
    without = case._replace(weights=case.weights.clone(), locations=case.locations.clone())
    without.weights[:, ::2, ..., 1] = 0
    without.locations[:, ::2, ..., 1, :] = 0.5
    out, grad_value, grad_locations, grad_weights = computed(case)
    assert torch.equal(out, COMPILED.ms_deform_attn_forward(*without.inputs))
    assert torch.equal(grad_value, computed(without)[1])
    assert not grad_locations[:, ::2, ..., 1, :].any()
    assert not grad_weights[:, ::2, ..., 1].any()


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_cells_without_weight_may_be_anything(instruction_set, number, queries):
    # Query 0 samples the centre of cell (1, 1), where the other three corners weigh nothing; the
    # last one gives a cell that is not finite no attention. Sizes are powers of two: exact.
    case = make_case(shapes=[(4, 8)], points=1, queries=queries)
    case.locations[:] = (torch.tensor([1.0, 1.0]) + 0.5) / torch.tensor([8.0, 4.0])
    case.locations[:, -1] = (torch.tensor([5.2, 2.3]) + 0.5) / torch.tensor([8.0, 4.0])
    case.weights[:, -1] = 0
    clean = computed(case)
    poisoned = case._replace(value=case.value.clone())
    poisoned.value[:, [10, 17, 18, 21, 22, 29, 30]] = number
    out, grad_value, _, grad_weights = computed(poisoned)
    assert torch.equal(out, clean[0])
    assert torch.equal(grad_value, clean[1])
    assert torch.equal(grad_weights[:, :-1], clean[3][:, :-1])


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_cells_that_are_not_finite_reach_whoever_reads_them(instruction_set, queries):
    case = make_case(queries=queries)
    case.value[0, 3] = float("nan")
    out = COMPILED.ms_deform_attn_forward(*case.inputs)
    reads = reference_forward(case._replace(value=(case.value != case.value).double())) != 0
    assert torch.equal(out.isnan(), reads)


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_masked_cells_read_as_zeros_whatever_they_are(instruction_set, queries):
    case = make_fused_case(coordinates=2, masked=True, queries=queries)
    clean = computed_fused(case)
    case.value[case.padding_mask] = float("nan")
    assert_same_bits(computed_fused(case), clean)
    assert not clean[1][case.padding_mask].any()


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="no kernels called sse9"):
        COMPILED.use_cpu_kernels("sse9")
