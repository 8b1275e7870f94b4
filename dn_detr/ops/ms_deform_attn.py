"""Multi-scale deformable attention as registered operators, `torch.ops.dn_detr.*`.

Zhu et al., "Deformable DETR", 2021, equation 3 (https://arxiv.org/abs/2010.04159).

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
The operators are opaque to `torch.compile` and `torch.export`. Compiled kernels (csrc/) compute
them where the installation built some for the device, `dn_detr.ops.eager` elsewhere. Values
may have any floating type, also under autocast; coordinates and weights of another type are
converted to float32 (float64 with float64 values), in which all arithmetic is done: 1 / 1024 of a
map is a whole cell, more digits than half types have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import eager
from .library import call, compiled_operators


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum of bilinear samples of `value`, weighted, over levels and points.

    Samples outside a level's map, or at locations that are not finite, read zeros; cell centres
    lie at (i + 0.5) / size.

    Args:
        value: (B, S, H, D) projected features of all levels, one after the other.
        spatial_shapes: (L, 2) int64, height and width of each level; best kept on the CPU, where
            reading it does not stall an accelerator.
        level_start_index: (L,) int64, first cell of each level within S.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans a level's map.
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D) in the type of `value`.

    Raises:
        ValueError: types, devices or shapes that do not fit together; the argument is named.
    """
    return torch.ops.dn_detr.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """`ms_deform_attn` from what the linear layers of an attention module give, in one pass.

    Args:
        value: (B, S, H, D) projected features of all levels, one after the other.
        spatial_shapes: (L, 2) int64, height and width of each level; best kept on the CPU.
        level_start_index: (L,) int64, first cell of each level within S.
        reference_points: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (cx, cy, w, h); [0, 1]
            spans a level's map.
        offsets: (B, Q, H, L, P, 2) from the reference, in cells of the level from a point, in half
            box sizes divided by P from a box's centre.
        logits: (B, Q, H, L * P); their softmax over levels and points weighs the samples.
        padding_mask: (B, S) bool, True = padding: such cells read as zeros, whatever they hold.

    Returns:
        (B, Q, H * D) in the type of `value`.

    Raises:
        ValueError: types, devices or shapes that do not fit together; the argument is named.
    """
    return torch.ops.dn_detr.ms_deform_attn_fused(
        value, spatial_shapes, level_start_index, reference_points, offsets, logits, padding_mask
    )


def _kernel(name: str, value: Tensor, in_pytorch: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled kernel if it can compute with values like these, else the one in PyTorch."""
    operators = compiled_operators(value.device)
    dim = value.shape[-1] if value.dim() else 0
    if operators is None or dim % 4 or dim > 256:
        return in_pytorch
    # On a CPU every order of additions is fixed anyway.
    if name.endswith("backward") and value.is_cuda and torch.are_deterministic_algorithms_enabled():
        name += "_deterministic"
    return partial(call, getattr(operators, name))


def _prepared(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, **tensors: Tensor | None
) -> list[Tensor | None]:
    """Inputs on the devices and in the types that the kernels take."""
    dtype = eager.working_type(value)
    levels = (spatial_shapes, level_start_index)  # may lie on the CPU, or with `value`
    inputs: list[Tensor | None] = [*(levels if value.is_cuda else (x.cpu() for x in levels))]
    for name, tensor in tensors.items():
        if tensor is not None:
            eager.check_device(name, tensor, value)
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        inputs.append(tensor)
    return inputs


@torch.library.custom_op("dn_detr::ms_deform_attn", mutates_args=())
def _forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    inputs = _prepared(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    out: Tensor = _kernel("ms_deform_attn_forward", value, eager.forward)(value, *inputs)
    return out


@torch.library.custom_op("dn_detr::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _prepared(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    kernel = _kernel("ms_deform_attn_backward", value, eager.backward)
    g_value, g_locations, g_weights = kernel(grad_output, value, *inputs)
    return (
        g_value.to(value.dtype),
        g_locations.to(sampling_locations.dtype),
        g_weights.to(attention_weights.dtype),
    )


@torch.library.custom_op("dn_detr::ms_deform_attn_fused", mutates_args=())
def _fused_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
) -> Tensor:
    inputs = _prepared(
        value,
        spatial_shapes,
        level_start_index,
        reference_points=reference_points,
        offsets=offsets,
        logits=logits,
        padding_mask=padding_mask,
    )
    kernel = _kernel("ms_deform_attn_fused_forward", value, eager.fused_forward)
    out: Tensor = kernel(value, *inputs)
    return out


@torch.library.custom_op("dn_detr::ms_deform_attn_fused_backward", mutates_args=())
def _fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _prepared(
        value,
        spatial_shapes,
        level_start_index,
        reference_points=reference_points,
        offsets=offsets,
        logits=logits,
        padding_mask=padding_mask,
    )
    kernel = _kernel("ms_deform_attn_fused_backward", value, eager.fused_backward)
    g_value, g_references, g_offsets, g_logits = kernel(grad_output, value, *inputs)
    return (
        g_value.to(value.dtype),
        g_references.to(reference_points.dtype),
        g_offsets.to(offsets.dtype),
        g_logits.to(logits.dtype),
    )


# ---- shapes without numbers, for torch.compile and torch.export ----


def _check_traced(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, **tensors: Tensor | None
) -> None:
    """What can be said without reading numbers, and without binding sizes to each other."""
    eager.check_rank("value", value, 4, "(B, S, H, D)")
    for name, integers in (
        ("spatial_shapes", spatial_shapes),
        ("level_start_index", level_start_index),
    ):  # may lie on any device that holds numbers
        if integers.device.type == "meta":
            eager.check_device(name, integers, value)
    for name, tensor in tensors.items():
        if tensor is not None:
            eager.check_device(name, tensor, value)


@_forward.register_fake
def _(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    _check_traced(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    eager.check_rank("sampling_locations", sampling_locations, 6, "(B, Q, H, L, P, 2)")
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * dim)


@_fused_forward.register_fake
def _(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
) -> Tensor:
    _check_traced(
        value,
        spatial_shapes,
        level_start_index,
        reference_points=reference_points,
        offsets=offsets,
        logits=logits,
        padding_mask=padding_mask,
    )
    eager.check_rank("offsets", offsets, 6, "(B, Q, H, L, P, 2)")
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, offsets.shape[1], heads * dim)


@_backward.register_fake
def _(grad_output: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, *others[2:]))


@_fused_backward.register_fake
def _(grad_output: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, *others[2:5]))


# ---- autograd ----


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = torch.ops.dn_detr.ms_deform_attn_backward(
        grad_output, *ctx.saved_tensors
    )
    return value, None, None, locations, weights


def _differentiate_fused(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, references, offsets, logits = torch.ops.dn_detr.ms_deform_attn_fused_backward(
        grad_output, *ctx.saved_tensors
    )
    return value, None, None, references, offsets, logits, None


_forward.register_autograd(_differentiate, setup_context=_save_inputs)
_fused_forward.register_autograd(_differentiate_fused, setup_context=_save_inputs)
