"""Multi-scale deformable attention as the registered operator ``torch.ops.dn_detr.ms_deform_attn``.

Zhu et al., "Deformable DETR", 2021, equation 3 (https://arxiv.org/abs/2010.04159).

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
The kernel here is plain PyTorch (``grid_sample``), correct on every device and in half types. The
operator is opaque to ``torch.compile`` and ``torch.export``; faster kernels register behind the
same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum of bilinear samples of ``value``, weighted, over levels and points.

    Samples outside a level's map read zeros; cell centres lie at (i + 0.5) / size.

    Args:
        value: (B, S, H, D) projected features of all levels, one after the other.
        spatial_shapes: (L, 2) int64, height and width of each level; best kept on the CPU, where
            reading it does not stall an accelerator.
        level_start_index: (L,) int64, first cell of each level within S.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans a level's map.
        attention_weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D) in the type of ``value``.

    Raises:
        ValueError: shapes that do not fit together.
    """
    return torch.ops.dn_detr.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def _check_shapes(
    value: Tensor, spatial_shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> list[list[int]]:
    """The levels' [height, width] as integers, after checking that all inputs fit together."""
    batch, cells, heads, _ = value.shape
    levels = spatial_shapes.shape[0]
    if locations.shape[0] != batch or locations.shape[2:4] != (heads, levels):
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} do not fit value {tuple(value.shape)} "
            f"and {levels} levels: expected (B, Q, H, L, P, 2)"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights {tuple(weights.shape)} must have the shape of sampling_locations "
            f"{tuple(locations.shape)} without its last dimension"
        )
    shapes = spatial_shapes.tolist()
    sizes = [h * w for h, w in shapes]
    if sum(sizes) != cells:
        raise ValueError(f"spatial_shapes {shapes} do not add up to the {cells} cells of value")
    if starts.tolist() != [0, *accumulate(sizes)][:-1]:
        raise ValueError(
            f"level_start_index {starts.tolist()} does not fit levels of {sizes} cells, one after "
            "the other"
        )
    return shapes


def _per_level(
    value: Tensor, shapes: list[list[int]], locations: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each level's maps (N, D, h, w), grid (N, Q, P, 2) and weights (N, 1, Q, P); N = B * H."""
    dtype = _working_type(value)
    cells = value.split([h * w for h, w in shapes], dim=1)
    for level, (height, width) in enumerate(shapes):
        maps = cells[level].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        grid = (2 * locations[:, :, :, level].to(dtype) - 1).transpose(1, 2).flatten(0, 1)
        weights_N1QP = weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)[:, None]
        yield maps.to(dtype), grid, weights_N1QP


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """(N, D, h, w) at (N, Q, P, 2) -> (N, D, Q, P)."""
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _working_type(value: Tensor) -> torch.dtype:
    """Half types are computed in float32: their sums lose digits, and on CPUs worse happens."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


@torch.library.custom_op("dn_detr::ms_deform_attn", mutates_args=())
def _ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    shapes = _check_shapes(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    batch, _, heads, dim = value.shape
    queries = sampling_locations.shape[1]
    out_NDQ = value.new_zeros(batch * heads, dim, queries, dtype=_working_type(value))
    for maps, grid, weights in _per_level(value, shapes, sampling_locations, attention_weights):
        out_NDQ += (_sample(maps, grid) * weights).sum(-1)
    out = out_NDQ.view(batch, heads * dim, queries).transpose(1, 2)
    return out.to(value.dtype).contiguous()


@torch.library.custom_op("dn_detr::ms_deform_attn_backward", mutates_args=())
def _ms_deform_attn_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; samples are computed again rather than kept."""
    shapes = _check_shapes(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    batch, _, heads, dim = value.shape
    grad_NDQ1 = grad_out.to(_working_type(value)).transpose(1, 2)
    grad_NDQ1 = grad_NDQ1.reshape(batch * heads, dim, grad_out.shape[1], 1)
    value_grads, grid_grads, weights_grads = [], [], []
    for maps, grid, weights in _per_level(value, shapes, sampling_locations, attention_weights):
        maps_grad, grid_grad = torch.ops.aten.grid_sampler_2d_backward(
            grad_NDQ1 * weights, maps, grid, 0, 0, False, [True, True]
        )
        value_grads.append(maps_grad.flatten(2).unflatten(0, (batch, heads)).permute(0, 3, 1, 2))
        grid_grads.append(grid_grad.unflatten(0, (batch, heads)))
        weights_grads.append((_sample(maps, grid) * grad_NDQ1).sum(1).unflatten(0, (batch, heads)))
    value_grad = torch.cat(value_grads, dim=1)
    locations_grad = 2 * torch.stack(grid_grads, dim=3).transpose(1, 2)  # (B, Q, H, L, P, 2)
    weights_grad = torch.stack(weights_grads, dim=3).transpose(1, 2)  # (B, Q, H, L, P)
    return (
        value_grad.to(value.dtype).contiguous(),
        locations_grad.to(sampling_locations.dtype).contiguous(),
        weights_grad.to(attention_weights.dtype).contiguous(),
    )


@_ms_deform_attn.register_fake
def _(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * dim)


@_ms_deform_attn_backward.register_fake
def _(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, attention_weights)
    value_grad, locations_grad, weights_grad = (x.new_empty(x.shape) for x in inputs)
    return value_grad, locations_grad, weights_grad


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    value_grad, locations_grad, weights_grad = torch.ops.dn_detr.ms_deform_attn_backward(
        grad_out, *ctx.saved_tensors
    )
    return value_grad, None, None, locations_grad, weights_grad


_ms_deform_attn.register_autograd(_backward, setup_context=_save_inputs)
# Sampling locations need more digits than half types have: 1 / 1024 of a map is a whole cell.
_ms_deform_attn.register_autocast("cpu", torch.float32)
_ms_deform_attn.register_autocast("cuda", torch.float32)
