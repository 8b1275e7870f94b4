"""What the benchmark of deformable attention runs: inputs, the operators and their reference.

Legend: B batch, S cells, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.ops import ms_deform_attn, ms_deform_attn_fused

SHAPES = [(100, 134), (50, 67), (25, 34), (13, 17)]
HEADS, DIM, LEVELS, POINTS = 8, 32, 4, 4
CHANNELS = HEADS * DIM
DECODER_QUERIES = 500

SPATIAL_SHAPES = torch.tensor(SHAPES)
SIZES = SPATIAL_SHAPES.prod(1)
STARTS = SIZES.cumsum(0) - SIZES
CELLS = int(SIZES.sum())

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
Core = Callable[..., Tensor]
Pass = Callable[[], Any]


class Inputs(NamedTuple):
    """Tensors of one case, on one device."""

    value: Tensor  # (B, S, H, D)
    reference_points: Tensor  # (B, Q, L, 2)
    offsets: Tensor  # (B, Q, H, L, P, 2)
    logits: Tensor  # (B, Q, H, L * P)
    locations: Tensor  # (B, Q, H, L, P, 2)
    weights: Tensor  # (B, Q, H, L, P)
    grad_output: Tensor  # (B, Q, H * D)


def _cell_centres() -> Tensor:
    """(S, 2) as (x, y) in [0, 1]."""
    levels = []
    for height, width in SHAPES:
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height,
            (torch.arange(width) + 0.5) / width,
            indexing="ij",
        )
        levels.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(levels)


def _off_borders(references: Tensor, offsets: Tensor) -> Tensor:
    """Moves samples away from borders, where the gradient jumps and rounding decides the side."""
    size_wh = SPATIAL_SHAPES.flip(-1)[:, None]
    positions = references[:, :, None, :, None] * size_wh + offsets - 0.5
    fractions = positions - positions.floor()
    return offsets + fractions.clamp(0.01, 0.99) - fractions


def make_inputs(case: str, batch: int, device: str = "cpu") -> Inputs:
    """Random inputs; offsets of about two cells, no sample on the border of a cell."""
    generator = torch.Generator().manual_seed(0)
    if "encoder" in case:
        points = _cell_centres().expand(batch, -1, -1)
    else:
        points = torch.rand(batch, DECODER_QUERIES, 2, generator=generator)
    references = points[:, :, None].expand(-1, -1, LEVELS, -1).contiguous()
    grid = (batch, points.shape[1], HEADS, LEVELS, POINTS)
    offsets = _off_borders(references, 2 * torch.randn(*grid, 2, generator=generator))
    logits = torch.randn(*grid[:3], LEVELS * POINTS, generator=generator)
    locations = references[:, :, None, :, None] + offsets / SPATIAL_SHAPES.flip(-1)[:, None]
    weights = logits.softmax(-1).unflatten(-1, (LEVELS, POINTS))
    value = torch.randn(batch, CELLS, HEADS, DIM, generator=generator)
    grad_output = torch.randn(batch, grid[1], CHANNELS, generator=generator)
    tensors = (value, references, offsets, logits, locations, weights, grad_output)
    return Inputs(*(x.to(device) for x in tensors))


# ---- the two contestants ----


def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, SPATIAL_SHAPES, STARTS, locations, weights)


def ours_fused(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return ms_deform_attn_fused(value, SPATIAL_SHAPES, STARTS, references, offsets, logits)


def eager(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The grid_sample formulation."""
    batch, queries, heads, levels, points, _ = locations.shape
    grids = 2 * locations - 1
    sampled = []
    for level, cells in enumerate(value.split(SIZES.tolist(), dim=1)):
        maps = cells.flatten(2).transpose(1, 2).reshape(batch * heads, -1, *SHAPES[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid, align_corners=False))
    flat = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    out = (torch.stack(sampled, -2).flatten(-2) * flat).sum(-1)
    return out.view(batch, -1, queries).transpose(1, 2).contiguous()


@cache
def _sizes_wh(device: torch.device, dtype: torch.dtype) -> Tensor:
    return SPATIAL_SHAPES.flip(-1)[:, None].to(device, dtype)


def eager_fused(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Softmax and location arithmetic as separate operations, then `eager`."""
    sizes = _sizes_wh(offsets.device, offsets.dtype)
    locations = references[:, :, None, :, None] + offsets / sizes
    return eager(value, locations, logits.softmax(-1).unflatten(-1, (LEVELS, POINTS)))


CORES = {"ours": (ours, ours_fused), "reference": (eager, eager_fused)}


# ---- passes ----


def make_pass(core: str, case: str, inputs: Inputs, direction: str, dtype: torch.dtype) -> Pass:
    """The function to time.

    Args:
        core: "ours", "reference", or "linears" of a module's case alone.
        case: of the benchmark's table.
        inputs: float32 or float64.
        direction: FORWARD, BACKWARD or BOTH.
        dtype: of values; the reference needs all its inputs in one type.
    """
    if "module" in case:
        return _module_pass(None if core == "linears" else CORES[core][1], inputs, direction)
    fused = "fused" in case
    names = ("reference_points", "offsets", "logits") if fused else ("locations", "weights")
    tensors = {name: getattr(inputs, name) for name in ("value", *names)}
    for name in tensors if core == "reference" else ("value",):
        tensors[name] = tensors[name].to(dtype)
    return _operator_pass(CORES[core][fused], tensors, inputs.grad_output.to(dtype), direction)


def _operator_pass(
    core: Core, tensors: dict[str, Tensor], grad_output: Tensor, direction: str
) -> Pass:
    if direction == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return core(*tensors.values())

        return forward

    def leaves_and_output() -> tuple[list[Tensor], Tensor]:
        constant = "reference_points"
        inputs = [x.detach().requires_grad_(name != constant) for name, x in tensors.items()]
        return [x for x in inputs if x.requires_grad], core(*inputs)

    if direction == BACKWARD:
        leaves, out = leaves_and_output()
        return lambda: torch.autograd.grad(out, leaves, grad_output, retain_graph=True)

    def forward_backward() -> tuple[Tensor, ...]:
        leaves, out = leaves_and_output()
        return torch.autograd.grad(out, leaves, grad_output)

    return forward_backward


def _module_pass(core: Core | None, inputs: Inputs, direction: str) -> Pass:
    """The module around `core`; None: its linear layers alone, each with its gradients."""
    gradients = direction != FORWARD
    generator = torch.Generator().manual_seed(1)
    device = inputs.value.device
    outputs = {"value": CHANNELS, "offsets": HEADS * LEVELS * POINTS * 2,
               "logits": HEADS * LEVELS * POINTS, "out": CHANNELS}  # fmt: skip
    matrices = {
        name: (torch.randn(n, CHANNELS, generator=generator) / 16).to(device)
        for name, n in outputs.items()
    }
    for matrix in matrices.values():
        matrix.requires_grad_(gradients)
    batch, queries = inputs.offsets.shape[:2]
    query = torch.randn(batch, queries, CHANNELS, generator=generator).to(device)
    memory = inputs.value.flatten(2)

    def run() -> Any:
        with torch.set_grad_enabled(gradients):
            x, m = (t.detach().requires_grad_(gradients) for t in (query, memory))
            value = F.linear(m, matrices["value"])
            offsets = F.linear(x, matrices["offsets"])
            logits = F.linear(x, matrices["logits"])
            if core is None:
                inner = inputs.grad_output.detach().requires_grad_(gradients)
            else:
                inner = core(
                    value.view(batch, CELLS, HEADS, DIM),
                    inputs.reference_points,
                    offsets.view(inputs.offsets.shape),
                    logits.view(inputs.logits.shape),
                )
            out = F.linear(inner, matrices["out"])
            if not gradients:
                return out
            leaves = [x, m, *matrices.values()]
            if core is not None:
                return torch.autograd.grad(out, leaves, inputs.grad_output)
            roots = (out, value, offsets, logits)
            starts = (inputs.grad_output, inputs.value.flatten(2), inputs.offsets.flatten(2),
                      inputs.logits.flatten(2))  # fmt: skip
            return torch.autograd.grad(roots, [*leaves, inner], starts)

    return run


def largest_error(case: str, batch: int, direction: str, dtype: torch.dtype, device: str) -> float:
    """Of ours against the reference in float64 on the same (rounded) inputs."""
    inputs = make_inputs(case, batch, device)
    rounded = inputs._replace(
        value=inputs.value.to(dtype).float(), grad_output=inputs.grad_output.to(dtype).float()
    )
    found = make_pass("ours", case, rounded, direction, dtype)()
    wide = Inputs(*(t.double() for t in rounded))
    exact = make_pass("reference", case, wide, direction, torch.float64)()
    pairs = [(found, exact)] if direction == FORWARD else zip(found, exact, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
