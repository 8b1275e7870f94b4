"""The operators on a GPU, through their public functions.

They are compared with float64 on the CPU (tests/ops/cases.py), but large cases with smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dn_detr.ops import ms_deform_attn, ms_deform_attn_fused

from ..ops.cases import (
    FEW,
    MANY,
    NOT_INSIDE,
    TYPES,
    Case,
    assert_near,
    assert_same_bits,
    computed,
    expected,
    make_case,
    strided,
)

LEVELS_OF_AN_IMAGE = ((100, 134), (50, 67), (25, 34), (13, 17))  # 800 x 1066 pixels
ON_THE_CPU = ("spatial_shapes", "level_start_index")  # reading them there does not stall a GPU


def on(device: torch.device, case: Case) -> Case:
    """The case there, but for the levels' sizes."""
    inputs = {
        name: x if x is None or name in ON_THE_CPU else x.to(device)
        for name, x in case.inputs.items()
    }
    return Case(inputs, case.grad_output.to(device))


def results(device: torch.device, case: Case) -> dict[str, Tensor]:
    """Output and gradients as computed there, on the CPU."""
    return {name: x.cpu() for name, x in computed(on(device, case)).items()}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- numbers ----


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dtype", TYPES)
def test_classic_operator_is_that_of_float64(device, dtype, queries):
    case = make_case(dtype, queries=queries)
    assert_near(results(device, case), expected(case))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", TYPES)
def test_fused_operator_is_that_of_float64(device, dtype, coordinates, masked):
    case = make_case(dtype, coordinates=coordinates, masked=masked, queries=MANY)
    assert_near(results(device, case), expected(case))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 20, 24, 48, 64, 68, 100, 128, 256])
def test_every_head_dim(device, dim, dtype):
    for coordinates in (0, 4):
        case = make_case(dtype, coordinates=coordinates, dim=dim, queries=20)
        assert_near(results(device, case), expected(case))


@pytest.mark.parametrize("points", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("levels", [1, 2, 5, 9, 20])
def test_every_number_of_levels_and_points(device, levels, points):
    shapes = [(6 - i % 5, 1 + i) for i in range(levels)]
    for coordinates in (0, 2, 4):
        case = make_case(coordinates=coordinates, shapes=shapes, points=points, queries=20)
        assert_near(results(device, case), expected(case))


@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_decoder_of_a_whole_image(device, coordinates):
    case = make_case(
        coordinates=coordinates, masked=True, shapes=LEVELS_OF_AN_IMAGE, queries=500, heads=8
    )
    assert_near(results(device, case), expected(case))


@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_gradients_are_finite_differences(device, coordinates):
    case = make_case(
        torch.float64, coordinates=coordinates, masked=True, shapes=[(3, 4), (1, 2)], batch=1,
        queries=4, heads=1, dim=4, points=2,
    )  # fmt: skip
    operator = ms_deform_attn_fused if coordinates else ms_deform_attn
    case = on(device, case)
    for x in case.leaves.values():
        x.requires_grad_()
    # Atomic additions come in any order: the last bits differ between two runs.
    assert torch.autograd.gradcheck(operator, case.arguments, nondet_tol=1e-12)


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("number", NOT_INSIDE)
def test_locations_that_are_not_finite_sample_zero(device, number, coordinates):
    case = make_case(coordinates=coordinates, queries=MANY)
    name = "offsets" if case.is_fused else "sampling_locations"
    case[name][:, ::2, ..., 1, 0] = number
    far = case.changed(**{name: case[name].clone()})
    far[name][:, ::2, ..., 1, :] = 1e4  # outside the map, but a number
    found, reference = results(device, case), expected(far)
    assert not found[name][:, ::2, ..., 1, :].any()
    if coordinates == 4:  # a size's gradient is a product with the offset: NaN where that is NaN
        del found["reference_points"], reference["reference_points"]
    assert_near(found, reference)


def test_masked_cells_read_as_zeros_whatever_they_hold(device):
    case = make_case(coordinates=2, masked=True, queries=MANY)
    reference = expected(case)
    case["value"][case["padding_mask"]] = float("nan")
    assert_near(results(device, case), reference)


# ---- shapes, strides, sizes ----


@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"points": 0}, {"shapes": []}]
)
def test_empty_inputs_give_zeros(device, empty, coordinates):
    case = make_case(**empty, coordinates=coordinates, masked=True)
    found = results(device, case)
    assert {name: x.shape for name, x in found.items() if name != "output"} == {
        name: x.shape for name, x in case.leaves.items()
    }
    assert not any(x.any() for x in found.values())


def test_levels_without_cells_read_zeros(device):
    case = make_case(coordinates=4, shapes=[(0, 3), (4, 5), (2, 0), (0, 0)], queries=20)
    assert_near(results(device, case), expected(case))


def _reversed_in_memory(x: Tensor) -> Tensor:
    return strided(x, tuple(reversed(range(x.dim()))))


def _first_two_swapped_in_memory(x: Tensor) -> Tensor:
    return strided(x, (1, 0, *range(2, x.dim())))


@pytest.mark.parametrize("layout", [_reversed_in_memory, _first_two_swapped_in_memory])
@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_strided_inputs(device, coordinates, layout):
    case = on(device, make_case(coordinates=coordinates, masked=True, queries=MANY))
    changed = {n: layout(x) for n, x in case.inputs.items() if x is not None and x.dim() > 1}
    other = replace(case.changed(**changed), grad_output=layout(case.grad_output))
    with deterministic():
        assert_same_bits(computed(other), computed(case))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_expanded_inputs(device, coordinates):
    case = on(device, make_case(coordinates=coordinates, masked=True, queries=MANY))
    expanded = case.changed(
        reference_points=case["reference_points"][:1, :, :1].expand_as(case["reference_points"]),
        padding_mask=case["padding_mask"][:1].expand_as(case["padding_mask"]),
    )
    ones = torch.ones((), device=device).expand(case.grad_output.shape)
    expanded = replace(expanded, grad_output=ones)
    dense = expanded.changed(
        **{n: x.contiguous() for n, x in expanded.inputs.items() if x is not None}
    )
    dense = replace(dense, grad_output=expanded.grad_output.contiguous())
    with deterministic():
        assert_same_bits(computed(expanded), computed(dense))


def test_levels_may_lie_on_the_device(device):
    case = make_case(coordinates=2, queries=MANY)
    levels = {name: case[name].to(device) for name in ON_THE_CPU}
    found = computed(on(device, case).changed(**levels))
    assert_near({name: x.cpu() for name, x in found.items()}, expected(case))


def _row(case: Case, row: int) -> Case:
    """The case of one image of the batch."""
    inputs = {
        name: x if x is None or name in ON_THE_CPU else x[row : row + 1]
        for name, x in case.inputs.items()
    }
    return Case(inputs, case.grad_output[row : row + 1])


@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_a_big_batch_is_many_small_ones(device, coordinates):
    case = make_case(coordinates=coordinates, masked=True, batch=70_001, queries=2, dim=4)
    together = computed(on(device, case))
    for row in (0, 65_536, 70_000):
        alone = expected(_row(case, row))
        assert_near({name: x[row : row + 1].cpu() for name, x in together.items()}, alone)


def test_a_value_of_more_numbers_than_an_int32_counts(device):
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB of free memory")
    batch, height, width, heads, dim = 3, 1200, 1200, 8, 64
    assert batch * height * width * heads * dim > 2**31
    small = {"shapes": [(1, 1)], "batch": batch, "queries": 200, "heads": heads, "dim": dim}
    case = on(device, make_case(torch.bfloat16, **small))
    big = case.changed(
        value=torch.randn(batch, height * width, heads, dim, device=device, dtype=torch.bfloat16),
        spatial_shapes=torch.tensor([[height, width]]),
        sampling_locations=torch.rand_like(case["sampling_locations"]),
    )
    together = computed(big)
    for row in range(batch):
        alone = computed(_row(big, row))
        for name, x in together.items():
            torch.testing.assert_close(x[row : row + 1], alone[name], rtol=2**-7, atol=1e-3)


# ---- order, streams, stalls ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("coordinates", [0, 2, 4])
def test_deterministic_backward_gives_the_same_bits_every_time(device, coordinates, dtype):
    # Thousands of samples meet in each of 26 cells.
    case = make_case(dtype, coordinates=coordinates, masked=True, queries=3000)
    there = on(device, case)
    with deterministic():
        first = computed(there)
        for _ in range(5):
            assert_same_bits(computed(there), first)
    assert_near({name: x.cpu() for name, x in first.items()}, expected(case))


@contextmanager
def _busy_stream(device: torch.device) -> Iterator[None]:
    """Another stream than the default one, with work before whatever is queued now."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        yield
    stream.synchronize()


@pytest.mark.parametrize("coordinates", [0, 2])
def test_the_current_stream_is_used(device, coordinates):
    """Kernels of another stream would read the copies before they are made."""
    case = make_case(coordinates=coordinates, queries=MANY)
    there = on(device, case)
    copies = {name: torch.zeros_like(x) for name, x in there.leaves.items()}
    with _busy_stream(device):
        for name, x in there.leaves.items():
            copies[name].copy_(x)
        found = computed(there.changed(**copies))
    assert_near({name: x.cpu() for name, x in found.items()}, expected(case))


@pytest.mark.parametrize("coordinates", [0, 2])
def test_operators_do_not_wait_for_the_gpu(device, coordinates):
    there = on(device, make_case(coordinates=coordinates, masked=True, queries=MANY))
    if device.type != "cuda":
        pytest.skip("only GPUs compute while the program goes on")
    computed(there)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- wrong inputs ----


def _wrong(case: Case, name: str, change: Any) -> Case:
    return case.changed(**{name: change(case[name])})


CLASSIC_ERRORS = [
    ("value", lambda x: x[0], "value"),
    ("value", lambda x: x.long(), "value"),
    ("value", lambda x: x[:, 1:], "spatial_shapes"),
    ("value", lambda x: x[:1], "sampling_locations"),
    ("spatial_shapes", lambda x: x.int(), "spatial_shapes"),
    ("spatial_shapes", lambda x: -x, "spatial_shapes"),
    ("spatial_shapes", lambda x: x + 2**40, "spatial_shapes"),
    ("spatial_shapes", lambda x: x[:, :1], "spatial_shapes"),
    ("level_start_index", lambda x: x + 1, "level_start_index"),
    ("level_start_index", lambda x: x[:-1], "level_start_index"),
    ("sampling_locations", lambda x: x[..., :1], "sampling_locations"),
    ("sampling_locations", lambda x: x[:, :, :, 1:], "sampling_locations"),
    ("sampling_locations", lambda x: x.long(), "sampling_locations"),
    ("attention_weights", lambda x: x[:, :-1], "attention_weights"),
]
FUSED_ERRORS = [
    ("reference_points", lambda x: x[..., :1], "reference_points"),
    ("reference_points", lambda x: x[:, :-1], "reference_points"),
    ("offsets", lambda x: x[:, :, :, :-1], "offsets"),
    ("offsets", lambda x: x[..., 0], "offsets"),
    ("logits", lambda x: x[..., :-1], "logits"),
    ("logits", lambda x: x.long(), "logits"),
    ("padding_mask", lambda x: x.float(), "padding_mask"),
    ("padding_mask", lambda x: x[:, :-1], "padding_mask"),
]


@pytest.mark.parametrize(("name", "change", "named"), CLASSIC_ERRORS)
def test_errors_name_the_argument(device, name, change, named):
    case = _wrong(on(device, make_case()), name, change)
    with pytest.raises(ValueError, match=named):
        ms_deform_attn(*case.arguments)


@pytest.mark.parametrize(("name", "change", "named"), FUSED_ERRORS)
def test_errors_of_the_fused_operator_name_the_argument(device, name, change, named):
    case = _wrong(on(device, make_case(coordinates=2, masked=True)), name, change)
    with pytest.raises(ValueError, match=named):
        ms_deform_attn_fused(*case.arguments)


@pytest.mark.parametrize(
    "name", ["sampling_locations", "attention_weights", "reference_points", "offsets", "logits",
             "padding_mask"]
)  # fmt: skip
def test_errors_name_the_argument_on_another_device(device, name):
    if device.type != "cuda":
        pytest.skip("needs two devices")
    fused = name not in ("sampling_locations", "attention_weights")
    case = _wrong(
        on(device, make_case(coordinates=2 * fused, masked=True)), name, lambda x: x.cpu()
    )
    with pytest.raises(ValueError, match=name):
        (ms_deform_attn_fused if fused else ms_deform_attn)(*case.arguments)
