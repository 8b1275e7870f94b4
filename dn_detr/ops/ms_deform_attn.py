"""Multi-scale deformable attention as registered operators, `torch.ops.dn_detr.*`.

Zhu et al., "Deformable DETR", 2021, equation 3 (https://arxiv.org/abs/2010.04159).

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
The operators are opaque to `torch.compile` and `torch.export`. Compiled kernels (csrc/) compute
them where the installation built some for the device, `dn_detr.ops.eager` elsewhere. Values
may have any floating type, also under autocast; coordinates and weights of another type are
converted to float32 (float64 with float64 values), in which all arithmetic is done: 1 / 1024 of a
map is a whole cell, more digits than half types have. The functions here refuse forward-mode
differentiation; the operators themselves have a derivative of zero there, as custom ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
        attention_weights: (B, Q, H, L, P). One that is not finite at a sample outside the map is
            left out by the compiled kernels, while those in PyTorch make NaN of it.

    Returns:
        (B, Q, H * D) in the type of `value`.

    Raises:
        ValueError: types, devices or shapes that do not fit together; the argument is named.
        NotImplementedError: an argument has a tangent (forward-mode differentiation).
    """
    _refuse_tangents(value, sampling_locations, attention_weights)
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
        NotImplementedError: an argument has a tangent (forward-mode differentiation).
    """
    _refuse_tangents(value, reference_points, offsets, logits)
    return torch.ops.dn_detr.ms_deform_attn_fused(
        value, spatial_shapes, level_start_index, reference_points, offsets, logits, padding_mask
    )


def _refuse_tangents(*tensors: Tensor) -> None:
    """Refuse what PyTorch would silently take for a derivative of zero."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "deformable attention has no forward-mode derivative; use reverse mode "
            "(torch.autograd.grad, torch.func.vjp, jacrev)"
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


def _register(
    name: str, arguments: str, grid: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    """Register an operator, its backward, their shapes without numbers and its derivative.

    Args:
        name: of the operator in `torch.ops.dn_detr`.
        arguments: schema of those after `value` and the levels.
        grid: the one of them that is (B, Q, H, L, P, 2).
        forward: computes it in PyTorch.
        backward: computes the gradients of the floating-point arguments in PyTorch.
    """
    names = [argument.split()[-1] for argument in arguments.split(", ")]
    optional = arguments.count("Tensor? ")
    schema = f"Tensor value, Tensor spatial_shapes, Tensor level_start_index, {arguments}"

    def prepared(value: Tensor, levels: Sequence[Tensor], others: Any) -> list[Tensor | None]:
        """Inputs on the devices and in the types that the kernels take."""
        dtype = eager.working_type(value)
        # The levels may lie on the CPU, or with `value`.
        inputs: list[Tensor | None] = [*(levels if value.is_cuda else (x.cpu() for x in levels))]
        for argument, tensor in zip(names, others, strict=True):
            if tensor is not None:
                eager.check_device(argument, tensor, value)
                tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            inputs.append(tensor)
        return inputs

    def compute(value: Tensor, shapes: Tensor, starts: Tensor, *others: Tensor | None) -> Tensor:
        inputs = prepared(value, (shapes, starts), others)
        out: Tensor = _kernel(f"{name}_forward", value, forward)(value, *inputs)
        return out

    def compute_backward(
        grad_output: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, *others: Any
    ) -> tuple[Tensor, ...]:
        inputs = prepared(value, (shapes, starts), others)
        gradients = _kernel(f"{name}_backward", value, backward)(grad_output, value, *inputs)
        of = zip(gradients, (value, *others), strict=False)  # the mask, which is last, has none
        return tuple(gradient.to(x.dtype) for gradient, x in of)

    def fake(value: Tensor, shapes: Tensor, starts: Tensor, *others: Any) -> Tensor:
        """What can be said without reading numbers, and without binding sizes to each other."""
        eager.check_rank("value", value, 4, "(B, S, H, D)")
        for argument, integers in (("spatial_shapes", shapes), ("level_start_index", starts)):
            if integers.device.type == "meta":  # they may lie on any device that holds numbers
                eager.check_device(argument, integers, value)
        given = dict(zip(names, others, strict=True))
        for argument, tensor in given.items():
            if tensor is not None:
                eager.check_device(argument, tensor, value)
        eager.check_rank(grid, given[grid], 6, "(B, Q, H, L, P, 2)")
        batch, _, heads, dim = value.shape
        return value.new_empty(batch, given[grid].shape[1], heads * dim)

    def fake_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        value, _, _, *others = inputs
        of = (value, *others[: len(names) - optional])
        return tuple(x.new_empty(x.shape) for x in of)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, *others = backward_operator(grad_output, *ctx.saved_tensors)
        return value, None, None, *others, *[None] * optional

    results = ", ".join(["Tensor"] * (1 + len(names) - optional))
    operator = torch.library.custom_op(
        f"dn_detr::{name}", compute, mutates_args=(), schema=f"({schema}) -> Tensor"
    )
    backward_operator = torch.library.custom_op(
        f"dn_detr::{name}_backward",
        compute_backward,
        mutates_args=(),
        schema=f"(Tensor grad_output, {schema}) -> ({results})",
    )
    operator.register_fake(fake)
    backward_operator.register_fake(fake_backward)
    operator.register_autograd(differentiate, setup_context=save_inputs)


_register(
    "ms_deform_attn",
    "Tensor sampling_locations, Tensor attention_weights",
    "sampling_locations",
    eager.forward,
    eager.backward,
)
_register(
    "ms_deform_attn_fused",
    "Tensor reference_points, Tensor offsets, Tensor logits, Tensor? padding_mask",
    "offsets",
    eager.fused_forward,
    eager.fused_backward,
)
