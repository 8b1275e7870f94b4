"""Multi-scale deformable attention in plain PyTorch: one `grid_sample` per level.

Correct on every device, in every type and for every shape, and slow: what the compiled operators
are measured against, and what computes where there are none. Arguments, shapes and errors are
those of `dn_detr.ops.ms_deform_attn`, to whose operators these functions belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_SIDE = 2**24  # whole numbers up to here are exact in float32


def forward(*inputs: Tensor) -> Tensor:
    """(B, Q, H * D) of the arguments of `ms_deform_attn`."""
    value, _, _, locations, weights = inputs
    return _forward(value, check_inputs(*inputs), locations, weights)


def _forward(value: Tensor, shapes: list[list[int]], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    out_NDQ = value.new_zeros(batch * heads, dim, queries, dtype=working_type(value))
    for _, maps, grid, weights_N1QP in _per_level(value, shapes, locations, weights):
        out_NDQ += (_sample(maps, grid) * weights_N1QP).sum(-1)
    out = out_NDQ.view(batch, heads * dim, queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()


def backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; samples are computed again rather than kept."""
    value, _, _, locations, weights = inputs
    shapes = check_inputs(*inputs)
    _check_grad_output(grad_output, value, locations)
    return _backward(grad_output, value, shapes, locations, weights)


def _backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[list[int]],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, dim = value.shape
    dtype = working_type(value)
    value_grad = torch.zeros_like(value, memory_format=torch.contiguous_format, dtype=dtype)
    locations_grad = torch.zeros_like(locations, memory_format=torch.contiguous_format, dtype=dtype)
    weights_grad = torch.zeros_like(weights, memory_format=torch.contiguous_format, dtype=dtype)
    grad_NDQ1 = grad_output.to(dtype).transpose(1, 2)
    grad_NDQ1 = grad_NDQ1.reshape(batch * heads, dim, grad_output.shape[1], 1)
    value_grads = value_grad.split([h * w for h, w in shapes], dim=1)
    for level, maps, grid, weights_N1QP in _per_level(value, shapes, locations, weights):
        maps_grad, grid_grad = torch.ops.aten.grid_sampler_2d_backward(
            grad_NDQ1 * weights_N1QP, maps, grid, 0, 0, False, [True, True]
        )
        samples_grad = (_sample(maps, grid) * grad_NDQ1).sum(1)  # (N, Q, P)
        maps_grad = maps_grad.flatten(2).unflatten(0, (batch, heads))
        value_grads[level].copy_(maps_grad.permute(0, 3, 1, 2))
        grid_grad = grid_grad.unflatten(0, (batch, heads)).transpose(1, 2)
        locations_grad[:, :, :, level] = 2 * grid_grad
        weights_grad[:, :, :, level] = samples_grad.unflatten(0, (batch, heads)).transpose(1, 2)
    return (
        value_grad.to(value.dtype),
        locations_grad.to(locations.dtype),
        weights_grad.to(weights.dtype),
    )


def fused_forward(*inputs: Any) -> Tensor:
    """(B, Q, H * D) of the arguments of `ms_deform_attn_fused`."""
    value, spatial_shapes, _, references, offsets, logits, padding_mask = inputs
    shapes = check_fused_inputs(*inputs)
    locations = _locations(references, offsets, spatial_shapes)
    value = _without_padding(value, padding_mask)
    return _forward(value, shapes, locations, _softmax(logits, offsets))


def fused_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference points, offsets and logits."""
    value, spatial_shapes, _, references, offsets, logits, padding_mask = inputs
    shapes = check_fused_inputs(*inputs)
    _check_grad_output(grad_output, value, offsets)
    value = _without_padding(value, padding_mask)
    locations = _locations(references, offsets, spatial_shapes)
    weights = _softmax(logits, offsets)
    value_grad, locations_grad, weights_grad = _backward(
        grad_output, value, shapes, locations, weights
    )
    logits_grad = torch.ops.aten._softmax_backward_data(
        weights_grad.flatten(-2), weights.flatten(-2), -1, weights.dtype
    )
    if references.shape[-1] == 2:
        offsets_grad = locations_grad / _sizes_wh(spatial_shapes, offsets)
        references_grad = locations_grad.sum((2, 4))
    else:
        points = offsets.shape[-2]
        half_grad = locations_grad * 0.5
        offsets_grad = _product(half_grad, references[:, :, None, :, None, 2:] / points)
        sizes_grad = _product(half_grad, offsets / points).sum((2, 4))
        references_grad = torch.cat([locations_grad.sum((2, 4)), sizes_grad], dim=-1)
    return (
        _without_padding(value_grad, padding_mask),
        references_grad.to(references.dtype),
        offsets_grad.to(offsets.dtype),
        logits_grad.to(logits.dtype),
    )


def _product(factor: Tensor, number: Tensor) -> Tensor:
    """Zero for a factor of zero, whatever the number: samples that are not finite have no part."""
    return torch.where(factor == 0, 0.0, factor * number)


def working_type(value: Tensor) -> torch.dtype:
    """Half types are computed in float32: their sums lose digits, and on CPUs worse happens."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# ---- checks, in the words of csrc/ms_deform_attn/inputs.h ----


def check_inputs(
    value: Tensor, spatial_shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> list[list[int]]:
    """The levels' [height, width] as integers, after checking that all inputs fit together."""
    shapes = _check_levels(value, spatial_shapes, starts)
    _check_locations("sampling_locations", locations, value, len(shapes))
    _check_float("attention_weights", weights, value)
    _check_shape("attention_weights", weights, tuple(locations.shape[:-1]))
    return shapes


def check_fused_inputs(
    value: Tensor,
    spatial_shapes: Tensor,
    starts: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding_mask: Tensor | None,
) -> list[list[int]]:
    """`check_inputs` for the fused operator."""
    shapes = _check_levels(value, spatial_shapes, starts)
    _check_locations("offsets", offsets, value, len(shapes))
    batch, queries, heads, levels, points, _ = offsets.shape
    _check_float("logits", logits, value)
    _check_shape("logits", logits, (batch, queries, heads, levels * points))
    _check_float("reference_points", references, value)
    check_rank("reference_points", references, 4, "(B, Q, L, 2 or 4)")
    if references.shape[-1] not in (2, 4):
        raise ValueError(f"reference_points have {references.shape[-1]} coordinates, not 2 or 4")
    _check_shape("reference_points", references, (batch, queries, levels, references.shape[-1]))
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool, not {padding_mask.dtype}")
        check_device("padding_mask", padding_mask, value)
        _check_shape("padding_mask", padding_mask, tuple(value.shape[:2]))
    return shapes


def _check_locations(name: str, locations: Tensor, value: Tensor, levels: int) -> None:
    _check_float(name, locations, value)
    check_rank(name, locations, 6, "(B, Q, H, L, P, 2)")
    queries, points = locations.shape[1], locations.shape[4]
    expected = (value.shape[0], queries, value.shape[2], levels, points, 2)
    _check_shape(name, locations, expected)


def _check_grad_output(grad_output: Tensor, value: Tensor, locations: Tensor) -> None:
    check_device("grad_output", grad_output, value)
    if grad_output.dtype != value.dtype:
        raise ValueError(f"grad_output is {grad_output.dtype}, but value {value.dtype}")
    batch, _, heads, dim = value.shape
    _check_shape("grad_output", grad_output, (batch, locations.shape[1], heads * dim))


def _check_levels(value: Tensor, spatial_shapes: Tensor, starts: Tensor) -> list[list[int]]:
    check_rank("value", value, 4, "(B, S, H, D)")
    _check_float("value", value, value)
    check_rank("spatial_shapes", spatial_shapes, 2, "(L, 2)")
    _check_shape("spatial_shapes", spatial_shapes, (len(spatial_shapes), 2))
    _check_shape("level_start_index", starts, (len(spatial_shapes),))
    for name, tensor in (("spatial_shapes", spatial_shapes), ("level_start_index", starts)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, not {tensor.dtype}")
    shapes: list[list[int]] = spatial_shapes.tolist()
    for level, (height, width) in enumerate(shapes):
        if not (0 <= height <= MAX_SIDE and 0 <= width <= MAX_SIDE):
            raise ValueError(
                f"spatial_shapes: level {level} has {height} x {width} cells, not 0 to 2^24 along "
                "each side"
            )
    sizes = [h * w for h, w in shapes]
    cells = value.shape[1]
    if sum(sizes) != cells:
        raise ValueError(
            f"spatial_shapes {shapes} add up to {sum(sizes)} cells, but value has {cells}"
        )
    expected = [0, *accumulate(sizes)][:-1]
    if starts.tolist() != expected:
        raise ValueError(
            f"level_start_index is {starts.tolist()}, expected {expected}: levels lie one after "
            "the other"
        )
    return shapes


def _check_float(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be float32, float64, float16 or bfloat16, not {tensor.dtype}"
        )
    check_device(name, tensor, value)


def check_device(name: str, tensor: Tensor, value: Tensor) -> None:
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, but value on {value.device}")


def check_rank(name: str, tensor: Tensor, rank: int, legend: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {legend}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {expected}")


# ---- arithmetic ----


def _without_padding(value: Tensor, padding_mask: Tensor | None) -> Tensor:
    return value if padding_mask is None else value.masked_fill(padding_mask[..., None, None], 0.0)


def _softmax(logits: Tensor, offsets: Tensor) -> Tensor:
    return logits.softmax(-1).unflatten(-1, offsets.shape[3:5])


def _sizes_wh(spatial_shapes: Tensor, like: Tensor) -> Tensor:
    """(L, 1, 2); a size of zero, which divides nothing, is that of a level without cells."""
    return spatial_shapes.flip(-1).to(like)[:, None].clamp_min(1)


def _locations(references: Tensor, offsets: Tensor, spatial_shapes: Tensor) -> Tensor:
    """(B, Q, L, 2 or 4) references and (B, Q, H, L, P, 2) offsets -> locations."""
    around = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        return around + offsets / _sizes_wh(spatial_shapes, offsets)
    return around[..., :2] + offsets / offsets.shape[-2] * around[..., 2:] * 0.5


def _per_level(
    value: Tensor, shapes: list[list[int]], locations: Tensor, weights: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Number, maps (N, D, h, w), grid (N, Q, P, 2) and weights (N, 1, Q, P); N = B * H.

    Levels without cells, which read as zeros, are left out.
    """
    if value.numel() == 0 or weights.numel() == 0:
        return
    dtype = working_type(value)
    cells = value.split([h * w for h, w in shapes], dim=1)
    for level, (height, width) in enumerate(shapes):
        if height * width == 0:
            continue
        maps = cells[level].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        grid = (2 * locations[:, :, :, level].to(dtype) - 1).transpose(1, 2).flatten(0, 1)
        weights_N1QP = weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)[:, None]
        # All beyond 2 reads zeros. grid_sample would convert larger numbers, and NaN, to integers.
        yield level, maps.to(dtype), grid.nan_to_num(nan=4.0).clamp(-4, 4), weights_N1QP


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """(N, D, h, w) at (N, Q, P, 2) -> (N, D, Q, P)."""
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
