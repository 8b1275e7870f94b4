"""Every wrong input is a ValueError that names the argument, whatever the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from .cases import Case, computed, make_case

KERNELS = pytest.mark.parametrize("kernels", ["pytorch", "compiled", "emulated"], indirect=True)


class Wrong(NamedTuple):
    """A change of one argument, and what the error must say of it, first of all its name."""

    argument: str
    change: Callable[[Tensor], Tensor]
    complaint: str
    blamed: str = ""  # if another argument is what no longer fits


_STARTS = "level_start_index"
LEVELS = [
    Wrong("value", lambda x: x[0], r"has the shape \(26, 2, 8\), expected \(B, S, H, D\)"),
    Wrong("value", lambda x: x[None], "has the shape"),
    Wrong("value", lambda x: x.long(), "must be float32"),
    Wrong("value", lambda x: x > 0, "must be float32"),
    Wrong("value", lambda x: x.to(torch.complex64), "must be float32"),
    Wrong("value", lambda x: x[:, 1:], "add up to", "spatial_shapes"),
    Wrong("value", lambda x: torch.cat([x, x], 1), "add up to 26 cells", "spatial_shapes"),
    Wrong("value", lambda x: x[:, :0], "add up to", "spatial_shapes"),
    Wrong("spatial_shapes", lambda x: x.int(), "must be int64"),
    Wrong("spatial_shapes", lambda x: x.float(), "must be int64"),
    Wrong("spatial_shapes", lambda x: x[0], "has the shape"),
    Wrong("spatial_shapes", lambda x: x[:, :1], "has the shape"),
    Wrong("spatial_shapes", lambda x: x.repeat(1, 2), "has the shape"),
    Wrong("spatial_shapes", lambda x: -x, "level 0 has -5 x -3 cells"),
    Wrong("spatial_shapes", lambda x: x * torch.tensor([1, -1]), "level 0 has 5 x -3 cells"),
    Wrong("spatial_shapes", lambda x: x - 2**63, "level 0 has"),
    Wrong("spatial_shapes", lambda x: x + 2**62, "level 0 has"),
    Wrong("spatial_shapes", lambda x: x * 2**31, "level 0 has"),
    Wrong("spatial_shapes", lambda x: x * 2**16, "add up to"),
    Wrong("spatial_shapes", lambda x: x + 1, "add up to"),
    Wrong("spatial_shapes", lambda x: x - 1, "", "(spatial_shapes|level_start_index)"),
    Wrong("spatial_shapes", lambda x: x.flip(0), "levels lie one after the other", _STARTS),
    Wrong("spatial_shapes", lambda x: x[:-1], "has the shape", _STARTS),
    Wrong("level_start_index", lambda x: x.int(), "must be int64"),
    Wrong("level_start_index", lambda x: x.float(), "must be int64"),
    Wrong("level_start_index", lambda x: x + 1, ""),
    Wrong("level_start_index", lambda x: x * -1, ""),
    Wrong("level_start_index", lambda x: x + 2**62, ""),
    Wrong("level_start_index", lambda x: x[[0, 2, 1]], ""),
    Wrong("level_start_index", lambda x: x[:-1], "has the shape"),
    Wrong("level_start_index", lambda x: x[:, None], "has the shape"),
]
CLASSIC = [
    Wrong("value", lambda x: x[:1], "has the shape", "sampling_locations"),
    Wrong("value", lambda x: x[:, :, :1], "has the shape", "sampling_locations"),
    Wrong("sampling_locations", lambda x: x[..., 0], "has the shape"),
    Wrong("sampling_locations", lambda x: x[..., :1], "has the shape"),
    Wrong("sampling_locations", lambda x: x.repeat(1, 1, 1, 1, 1, 2), "has the shape"),
    Wrong("sampling_locations", lambda x: x[:1], "has the shape"),
    Wrong("sampling_locations", lambda x: x[:, :, :1], "has the shape"),
    Wrong("sampling_locations", lambda x: x[:, :, :, 1:], "has the shape"),
    Wrong("sampling_locations", lambda x: x.int(), "must be float32"),
    Wrong("sampling_locations", lambda x: x[:, 1:], "has the shape", "attention_weights"),
    Wrong("attention_weights", lambda x: x[:, :-1], "has the shape"),
    Wrong("attention_weights", lambda x: x[..., :1], "has the shape"),
    Wrong("attention_weights", lambda x: x.flatten(3), "has the shape"),
    Wrong("attention_weights", lambda x: x.long(), "must be float32"),
]
FUSED = [
    Wrong("value", lambda x: x[:1], "has the shape", "offsets"),
    Wrong("value", lambda x: x[:, :, :1], "has the shape", "offsets"),
    Wrong("offsets", lambda x: x[..., 0], "has the shape"),
    Wrong("offsets", lambda x: x[:, :, :, :-1], "has the shape"),
    Wrong("offsets", lambda x: x.int(), "must be float32"),
    Wrong("offsets", lambda x: x[:, 1:], "has the shape", "logits"),
    Wrong("offsets", lambda x: x[..., :1, :], "has the shape", "logits"),
    Wrong("logits", lambda x: x[..., :-1], "has the shape"),
    Wrong("logits", lambda x: x.unflatten(-1, (3, 4)), "has the shape"),
    Wrong("logits", lambda x: x.int(), "must be float32"),
    Wrong("reference_points", lambda x: x[..., :1], "have 1 coordinates"),
    Wrong("reference_points", lambda x: torch.cat([x, x[..., :1]], -1), "have 3 coordinates"),
    Wrong("reference_points", lambda x: x[:, :-1], "has the shape"),
    Wrong("reference_points", lambda x: x[:, :, :1], "has the shape"),
    Wrong("reference_points", lambda x: x[:, :, 0], "has the shape"),
    Wrong("reference_points", lambda x: x.int(), "must be float32"),
    Wrong("padding_mask", lambda x: x.float(), "must be bool"),
    Wrong("padding_mask", lambda x: x.byte(), "must be bool"),
    Wrong("padding_mask", lambda x: x[:, :-1], "has the shape"),
    Wrong("padding_mask", lambda x: x[:1], "has the shape"),
    Wrong("padding_mask", lambda x: x[..., None], "has the shape"),
]
GRAD_OUTPUT = [
    Wrong("grad_output", lambda x: x[..., :-1], "has the shape"),
    Wrong("grad_output", lambda x: x[:, :-1], "has the shape"),
    Wrong("grad_output", lambda x: x.unflatten(-1, (2, -1)), "has the shape"),
    Wrong("grad_output", lambda x: x.half(), ""),
]


def _case(coordinates: int) -> Case:
    return make_case(
        coordinates=coordinates, masked=True, shapes=[(5, 3), (3, 3), (1, 2)], dim=8, queries=4
    )


def _changed(case: Case, wrong: Wrong) -> Case:
    if wrong.argument == "grad_output":
        return Case(case.inputs, wrong.change(case.grad_output))
    return case.changed(**{wrong.argument: wrong.change(case[wrong.argument])})


def _check_refusal(case: Case, wrong: Wrong) -> None:
    message = f"^{wrong.blamed or wrong.argument}.*{wrong.complaint}"
    operators = torch.ops.dn_detr
    name = "ms_deform_attn_fused" if case.is_fused else "ms_deform_attn"
    if wrong.argument != "grad_output":
        with pytest.raises(ValueError, match=message):
            getattr(operators, name)(*case.arguments)
    with pytest.raises(ValueError, match=message):
        getattr(operators, f"{name}_backward")(case.grad_output, *case.arguments)


def _id(value: Any) -> str | None:
    return value.argument if isinstance(value, Wrong) else None


@KERNELS
@pytest.mark.parametrize("wrong", LEVELS + CLASSIC + GRAD_OUTPUT, ids=_id)
def test_wrong_arguments_are_named(kernels, wrong):
    _check_refusal(_changed(_case(0), wrong), wrong)


@KERNELS
@pytest.mark.parametrize("wrong", LEVELS + FUSED + GRAD_OUTPUT, ids=_id)
def test_wrong_arguments_of_the_fused_operator_are_named(kernels, wrong):
    _check_refusal(_changed(_case(2), wrong), wrong)


@pytest.mark.parametrize("coordinates", [0, 2])
def test_arguments_on_another_device_are_named(coordinates):
    case = _case(coordinates)
    name = "ms_deform_attn_fused" if coordinates else "ms_deform_attn"
    for argument, tensor in case.inputs.items():
        if argument == "value":
            continue
        elsewhere = case.changed(**{argument: tensor.to("meta")})
        with pytest.raises(ValueError, match=f"^{argument} is on meta, but value on cpu"):
            getattr(torch.ops.dn_detr, name)(*elsewhere.arguments)


def test_integers_may_lie_in_memory_anyhow():
    case = _case(0)
    shapes = case["spatial_shapes"].t().contiguous().t()
    starts = torch.stack([case["level_start_index"]] * 2, 1)[:, 0]
    assert not shapes.is_contiguous() and not starts.is_contiguous()
    results = computed(case.changed(spatial_shapes=shapes, level_start_index=starts))
    assert all(torch.equal(x, computed(case)[k]) for k, x in results.items())


# ---- what the compiled libraries themselves refuse: the Python face never passes it on ----


@pytest.fixture(params=["cpu_operators", "emulated_operators"])
def operators(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("argument", "change", "complaint"),
    [
        ("value", lambda x: x[..., :6], "value has head dim 6, which is not a multiple of 4"),
        ("value", lambda x: x.repeat(1, 1, 1, 33), "value has head dim 264"),
        ("value", lambda x: x.double(), "sampling_locations must be float64, like value"),
        ("sampling_locations", lambda x: x.double(), "sampling_locations must be float32"),
        ("sampling_locations", lambda x: x.bfloat16(), "sampling_locations must be float32"),
        ("attention_weights", lambda x: x.double(), "attention_weights must be float32"),
    ],
)
def test_kernels_refuse_types_that_they_do_not_have(operators, argument, change, complaint):
    case = _case(0)
    case = case.changed(**{argument: change(case[argument])})
    with pytest.raises(ValueError, match=complaint):
        operators.ms_deform_attn_forward(*case.arguments)
    with pytest.raises(ValueError, match=complaint):
        operators.ms_deform_attn_backward(case.grad_output, *case.arguments)


def _far(shape: tuple[int, ...]) -> Tensor:
    """A tensor of any shape whose elements are all the same number in memory."""
    return torch.zeros(()).expand(shape)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ((1, 2**30, 1, 4, 1, 1, 1), "value has too many cells"),
        ((1, 1, 2**40, 4, 1, 1, 1), "value has too many heads"),
        ((2**40, 1, 1, 4, 1, 1, 1), "value has too large a batch"),
        ((1, 1, 1, 4, 2**40, 1, 1), "sampling_locations has too many queries"),
        ((1, 1, 1, 4, 1, 2**17, 1), "spatial_shapes has too many levels"),
        ((1, 1, 1, 4, 1, 1, 2**16), "sampling_locations has too many points"),
        ((1, 1, 1, 4, 1, 2**16, 2**8), "sampling_locations has too many points"),
    ],
)
def test_sizes_that_indices_cannot_count_are_refused(operators, sizes, complaint):
    batch, cells, heads, dim, queries, levels, points = sizes
    shapes = torch.zeros(levels, 2, dtype=torch.int64)
    shapes[0] = torch.tensor([1, cells])
    starts = torch.full((levels,), cells)
    starts[0] = 0
    grid = (batch, queries, heads, levels, points)
    with pytest.raises(ValueError, match=complaint):
        operators.ms_deform_attn_forward(
            _far((batch, cells, heads, dim)), shapes, starts, _far((*grid, 2)), _far(grid)
        )


@pytest.mark.parametrize("coordinates", [0, 2])
def test_tensors_without_memory_are_refused(operators, coordinates):
    """As the sharding of parameters leaves them behind."""
    for name in _case(coordinates).inputs:
        case = _case(coordinates)
        storage = case[name].untyped_storage()
        storage.resize_(storage.nbytes() - 8)
        forward = "ms_deform_attn_fused_forward" if coordinates else "ms_deform_attn_forward"
        with pytest.raises(ValueError, match=f"{name} reaches past the end of its storage"):
            getattr(operators, forward)(*case.arguments)


def test_gradient_without_memory_is_refused(operators):
    case = _case(0)
    case.grad_output.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="grad_output reaches past the end of its storage"):
        operators.ms_deform_attn_backward(case.grad_output, *case.arguments)


def test_unknown_instruction_sets_are_refused(cpu_operators):
    with pytest.raises(ValueError, match="no kernels called sse9"):
        cpu_operators.use_cpu_kernels("sse9")
