"""Wrong inputs are refused by an error that names the argument, whatever kernels compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dn_detr import ops
from dn_detr.ops import missing_kernels, use_kernels

from .cases import make_case, make_fused_case


@pytest.fixture(params=["pytorch", "compiled", pytest.param("emulated", marks=pytest.mark.slow)])
def operators(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What has ms_deform_attn_forward, ms_deform_attn_backward and so on."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated")
        return
    problem = missing_kernels("cpu")
    if request.param == "compiled" and problem is not None:
        pytest.skip(problem)
    with use_kernels("auto" if request.param == "compiled" else "pytorch"):
        yield _Public


class _Public:
    ms_deform_attn_forward = staticmethod(ops.ms_deform_attn)
    ms_deform_attn_backward = torch.ops.dn_detr.ms_deform_attn_backward
    ms_deform_attn_fused_forward = staticmethod(ops.ms_deform_attn_fused)
    ms_deform_attn_fused_backward = torch.ops.dn_detr.ms_deform_attn_fused_backward


Change = Callable[[torch.Tensor], torch.Tensor]

# Field, what is done to it, what the error says.
OF_BOTH: list[tuple[str, Change, str]] = [
    ("value", lambda x: x[0], r"value has the shape \(50, 2, 32\), expected \(B, S, H, D\)"),
    ("value", lambda x: x.long(), "value must be float32"),
    ("value", lambda x: x[:, 1:], "spatial_shapes"),
    ("value", lambda x: torch.cat([x, x], 1), "spatial_shapes .*add up to"),
    ("spatial_shapes", lambda x: x.int(), "spatial_shapes must be int64"),
    ("spatial_shapes", lambda x: x.float(), "spatial_shapes must be int64"),
    ("spatial_shapes", lambda x: x[:, :1], "spatial_shapes has the shape"),
    ("spatial_shapes", lambda x: x[0], "spatial_shapes has the shape"),
    ("spatial_shapes", lambda x: -x, "spatial_shapes: level 0 of -5 x -7"),
    ("spatial_shapes", lambda x: x + 1, "spatial_shapes"),
    ("spatial_shapes", lambda x: x * 2**40, "spatial_shapes"),
    ("spatial_shapes", lambda x: x + 2**62, "spatial_shapes"),
    ("spatial_shapes", lambda x: x[:-1], "level_start_index has the shape"),
    ("level_start_index", lambda x: x + 1, "level_start_index"),
    ("level_start_index", lambda x: x.flip(0), "level_start_index"),
    ("level_start_index", lambda x: x[[0, 2, 1, 3]], "level_start_index"),
    ("level_start_index", lambda x: x.float(), "level_start_index must be int64"),
    ("level_start_index", lambda x: x[:-1], "level_start_index has the shape"),
    ("grad_output", lambda x: x[..., :-1], "grad_output has the shape"),
    ("grad_output", lambda x: x[:1], "grad_output has the shape"),
    ("grad_output", lambda x: x.half(), "grad_output must have the type of value"),
]
OF_CLASSIC: list[tuple[str, Change, str]] = [
    ("value", lambda x: x[:1], "sampling_locations has the shape"),
    ("value", lambda x: x[:, :, :1], "sampling_locations has the shape"),
    ("locations", lambda x: x[..., 0], "sampling_locations has the shape"),
    ("locations", lambda x: x[..., :1], "sampling_locations has the shape"),
    ("locations", lambda x: x[:, :, :, 1:], "sampling_locations has the shape"),
    ("locations", lambda x: x.long(), "sampling_locations must be float32"),
    ("weights", lambda x: x[:, :-1], "attention_weights has the shape"),
    ("weights", lambda x: x[..., None], "attention_weights has the shape"),
    ("weights", lambda x: x.long(), "attention_weights must be float32"),
]
OF_FUSED: list[tuple[str, Change, str]] = [
    ("value", lambda x: x[:1], "offsets has the shape"),
    ("reference_points", lambda x: x[..., :1], "reference_points have 1 coordinates, not 2 or 4"),
    ("reference_points", lambda x: x[:, :-1], "reference_points has the shape"),
    ("reference_points", lambda x: x[:, :, 0], "reference_points has the shape"),
    ("reference_points", lambda x: x.long(), "reference_points must be float32"),
    ("offsets", lambda x: x[:, :, :, :-1], "offsets has the shape"),
    ("offsets", lambda x: x.flatten(-2), "offsets has the shape"),
    ("offsets", lambda x: x.bool(), "offsets must be float32"),
    ("logits", lambda x: x[..., :-1], "logits has the shape"),
    ("logits", lambda x: x.unflatten(-1, (4, 4)), "logits has the shape"),
    ("logits", lambda x: x.long(), "logits must be float32"),
    ("padding_mask", lambda x: x.float(), "padding_mask must be bool"),
    ("padding_mask", lambda x: x[:, :-1], "padding_mask has the shape"),
    ("padding_mask", lambda x: x[:1], "padding_mask has the shape"),
]


def _names(rows: list[tuple[str, Change, str]]) -> list[str]:
    return [f"{field}-{i}" for i, (field, _, _) in enumerate(rows)]


def _changed(case: Any, field: str, change: Change) -> Any:
    return case._replace(**{field: change(getattr(case, field))})


@pytest.mark.parametrize(
    ("field", "change", "complaint"), OF_BOTH + OF_CLASSIC, ids=_names(OF_BOTH + OF_CLASSIC)
)
def test_the_wrong_argument_is_named(operators, field, change, complaint):
    case = _changed(make_case(), field, change)
    if field != "grad_output":
        with pytest.raises(ValueError, match=complaint):
            operators.ms_deform_attn_forward(*case.inputs)
    with pytest.raises(ValueError, match=complaint):
        operators.ms_deform_attn_backward(case.grad_output, *case.inputs)


@pytest.mark.parametrize(
    ("field", "change", "complaint"), OF_BOTH + OF_FUSED, ids=_names(OF_BOTH + OF_FUSED)
)
def test_the_wrong_argument_of_the_fused_operator_is_named(operators, field, change, complaint):
    case = _changed(make_fused_case(coordinates=2, masked=True), field, change)
    if field != "grad_output":
        with pytest.raises(ValueError, match=complaint):
            operators.ms_deform_attn_fused_forward(*case.inputs)
    with pytest.raises(ValueError, match=complaint):
        operators.ms_deform_attn_fused_backward(case.grad_output, *case.inputs)
