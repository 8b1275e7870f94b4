"""What only the CUDA kernels have, run on the CPU by a small launch emulator (emulator/).

Numbers, strides and arguments are tested for all kernels alike, in the modules beside this one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from . import emulated
from .cases import (
    NOT_INSIDE,
    TYPES,
    Case,
    assert_near,
    assert_same_bits,
    computed_by,
    expected,
    make_case,
)

DECODER = ((100, 134), (50, 67), (25, 34), (13, 17))


@pytest.fixture
def operators(emulated_operators: Any) -> Any:
    return emulated_operators


@pytest.fixture
def shuffle(operators: Any) -> Iterator[Any]:
    """A function that draws the order of blocks and threads from a seed; undone afterwards."""
    function = ctypes.CDLL(str(emulated.library())).dn_detr_emulator_shuffle
    yield function
    function(0)


def _check(operators: Any, case: Case) -> None:
    """Forward, backward and deterministic backward are near float64."""
    reference = expected(case)
    for deterministic in (False, True):
        assert_near(computed_by(operators, case, deterministic=deterministic), reference)


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_deterministic_backward_is_near_float64(operators, dtype, coordinates):
    for dim in (16, 20, 32, 64):
        _check(operators, make_case(dtype, coordinates=coordinates, masked=True, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "coordinates"), [(torch.float32, 0), (torch.float32, 4), (torch.bfloat16, 2)], ids=str
)
def test_full_decoder_is_near_float64(operators, dtype, coordinates):
    case = make_case(
        dtype, coordinates=coordinates, masked=True, batch=1, heads=8, queries=500, shapes=DECODER
    )
    _check(operators, case)


# ---- order ----


@pytest.mark.parametrize("coordinates", [0, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_order_of_threads_changes_nothing_but_atomic_sums(operators, shuffle, dtype, coordinates):
    case = make_case(dtype, coordinates=coordinates, masked=True, queries=70)

    def run(seed: int) -> dict[str, torch.Tensor]:
        shuffle(seed)
        fast = computed_by(operators, case)
        del fast["value"]
        exact = computed_by(operators, case, deterministic=True)
        return {**fast, **{f"exact {name}": x for name, x in exact.items()}}

    first = run(0)
    for seed in (1, 2, 3):
        assert_same_bits(run(seed), first)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_deterministic_gradients_keep_their_digits_at_any_scale(operators, scale):
    case = make_case()
    scaled = replace(case, grad_output=case.grad_output * scale)
    gradient = computed_by(operators, scaled, deterministic=True)["value"].double() / scale
    assert_near({"value": gradient.float()}, {"value": expected(case)["value"]})


def test_deterministic_backward_of_zeros_is_zero(operators):
    case = make_case()
    case = replace(case, grad_output=torch.zeros_like(case.grad_output))
    results = computed_by(operators, case, deterministic=True)
    assert not any(x.any() for name, x in results.items() if name != "output")


# ---- what is not finite ----


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("bad", NOT_INSIDE)
def test_deterministic_backward_ignores_locations_that_are_not_finite(operators, coordinates, bad):
    case = make_case(coordinates=coordinates)
    spoilt, outside = case[case.sampled].clone(), case[case.sampled].clone()
    spoilt[0, 1, :, 1, 2, 0] = bad
    outside[0, 1, :, 1, 2, 0] = 1e4
    results, others = (
        computed_by(operators, case.changed(**{case.sampled: x}), deterministic=True)
        for x in (spoilt, outside)
    )
    if coordinates == 4:  # the gradient of a box's size is a product with the offset
        del results["reference_points"], others["reference_points"]
    assert_same_bits(results, others)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_that_are_not_finite_reach_only_what_they_touch(operators, deterministic):
    case = make_case()
    case.grad_output[1, 2, 3] = float("nan")
    bad = computed_by(operators, case, deterministic=deterministic)["value"].isnan()
    assert bad[1, :, 0, 3].any()
    bad[1, :, 0, 3] = False
    assert not bad.any()


# ---- sizes at which the kernels take another way ----


@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_levels_that_do_not_fit_the_launch_are_read_from_a_table(operators, coordinates):
    shapes = [(1 + i % 3, 1 + i % 4) for i in range(17)]
    _check(operators, make_case(dim=4, coordinates=coordinates, shapes=shapes))


@pytest.mark.parametrize("coordinates", [0, 2])
def test_far_cells_of_a_large_map_keep_their_digits(operators, coordinates):
    case = make_case(
        dim=4, coordinates=coordinates, shapes=[(1, 20_000)], queries=40, batch=1, heads=1
    )
    if coordinates:
        near = case["offsets"] % 3  # cells from the reference point
        case = case.changed(offsets=near, reference_points=0.1 * case["reference_points"] + 0.85)
        case["reference_points"][..., 1] = 0.5
        case["offsets"][..., 1] = 0
    output = computed_by(operators, case)["output"]
    assert output.any()
    assert_near({"output": output}, {"output": expected(case)["output"]})


@pytest.mark.parametrize("points", [1, 7, 1000])
def test_any_number_of_points_finds_its_level(operators, points):
    shapes = [(2, 3), (1, 1), (3, 2)]
    _check(operators, make_case(dim=4, batch=1, heads=1, queries=1, points=points, shapes=shapes))


def test_gradient_of_the_output_that_cannot_be_loaded_in_vectors_is_copied(operators):
    case = make_case()
    padded = torch.nn.functional.pad(case.grad_output, (1, 0), value=float("nan"))[..., 1:]
    view = replace(case, grad_output=padded)
    for deterministic in (False, True):
        assert_near(
            computed_by(operators, view, deterministic=deterministic),
            computed_by(operators, case, deterministic=deterministic),
        )
