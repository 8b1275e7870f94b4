"""Inputs of the deformable-attention operators, what they give in float64, and how to compare.

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.ops import ms_deform_attn, ms_deform_attn_fused

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the largest number of a tensor. Half types are float32 rounded once: half a unit of each number
# more, which is 3e-3 or less of the root mean square.
TOLERANCE = {torch.float64: 1e-12}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Few queries read the values as they lie, many a packed copy.
FEW, MANY = 3, 60
SHAPES = ((5, 7), (3, 4), (1, 2), (1, 1))
NOT_INSIDE = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9)


@dataclass(frozen=True)
class Case:
    """Arguments of the classic or of the fused operator, by name and in order, and a gradient."""

    inputs: Mapping[str, Tensor | None]
    grad_output: Tensor

    @property
    def is_fused(self) -> bool:
        return "offsets" in self.inputs

    @property
    def arguments(self) -> list[Tensor | None]:
        return list(self.inputs.values())

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What has gradients, as the operators return them."""
        integers = ("spatial_shapes", "level_start_index", "padding_mask")
        return {k: x for k, x in self.inputs.items() if x is not None and k not in integers}

    @property
    def sampled(self) -> str:
        """The argument that moves the samples."""
        return "offsets" if self.is_fused else "sampling_locations"

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    def changed(self, **changes: Tensor | None) -> Case:
        """The case with other inputs; an unknown name is an error."""
        assert changes.keys() <= self.inputs.keys()
        return replace(self, inputs={**self.inputs, **changes})


def real_type(dtype: torch.dtype) -> torch.dtype:
    """Of coordinates and weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cells(grid: tuple[int, ...], sizes_wh: Tensor, generator: torch.Generator) -> Tensor:
    """Sampling positions in cells, up to two cells outside, none near a kink of the samples.

    Where the fraction of a cell is zero the gradient jumps, and rounding decides the side.
    """
    position = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * (sizes_wh + 3) - 2
    fraction = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return position.floor() + fraction


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    coordinates: int = 0,
    masked: bool = False,
    shapes: Any = SHAPES,
    batch: int = 2,
    queries: int = FEW,
    heads: int = 2,
    dim: int = 32,
    points: int = 4,
    seed: int = 0,
) -> Case:
    """A random case; `coordinates` of a reference point are 2 or 4, or 0 for the classic one."""
    generator = torch.Generator().manual_seed(seed)
    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2)
    cells = spatial_shapes.prod(1)
    value = torch.randn(batch, int(cells.sum()), heads, dim, generator=generator).to(dtype)
    levels = {"spatial_shapes": spatial_shapes, "level_start_index": cells.cumsum(0) - cells}
    grid = (batch, queries, heads, len(shapes), points)
    sizes_wh = spatial_shapes.flip(-1).double()[:, None]  # (L, 1, 2)
    locations = (_cells(grid, sizes_wh, generator) + 0.5) / sizes_wh.clamp_min(1)
    grad_output = torch.randn(batch, queries, heads * dim, generator=generator).to(dtype)
    wide = real_type(dtype)
    if coordinates == 0:
        weights = torch.rand(grid, generator=generator).to(wide)
        samples = {"sampling_locations": locations.to(wide), "attention_weights": weights}
        return Case({"value": value, **levels, **samples}, grad_output)
    references = torch.rand(batch, queries, len(shapes), coordinates, generator=generator)
    references = (references * 0.5 + 0.2).to(wide)
    around = references.double()[:, :, None, :, None]
    scale = sizes_wh if coordinates == 2 else 2 * points / around[..., 2:]
    logits = 2 * torch.randn(*grid[:3], len(shapes) * points, generator=generator)
    mask = torch.rand(value.shape[:2], generator=generator) < 0.3 if masked else None
    samples = {
        "reference_points": references,
        "offsets": ((locations - around[..., :2]) * scale).to(wide),
        "logits": logits.to(wide),
        "padding_mask": mask,
    }
    return Case({"value": value, **levels, **samples}, grad_output)


# ---- float64, independent of the library's own PyTorch kernels ----


def _classic(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor):
    """One differentiable grid_sample per level."""
    batch, queries, heads, _, _, _ = locations.shape
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    for level, (height, width) in enumerate(shapes.tolist()):
        if height * width == 0:
            continue
        start = int(starts[level])
        cells = value[:, start : start + height * width]
        maps = cells.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (B * H, D, Q, P)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        out = out + (samples * weight).sum(-1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
    return out.flatten(2)


def _fused(value, shapes, starts, references, offsets, logits, mask) -> Tensor:
    if mask is not None:
        value = value.masked_fill(mask[..., None, None], 0.0)
    levels, points = offsets.shape[3:5]
    around = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        locations = around + offsets / shapes.flip(-1)[:, None].double().clamp_min(1)
    else:
        locations = around[..., :2] + offsets / points * around[..., 2:] * 0.5
    weights = logits.softmax(-1).unflatten(-1, (levels, points))
    return _classic(value, shapes, starts, locations, weights)


def _with_gradients(compute: Any, case: Case) -> dict[str, Tensor]:
    leaves = {k: x.detach().requires_grad_() for k, x in case.leaves.items()}
    out = compute(*{**case.inputs, **leaves}.values())
    if not out.requires_grad:  # no level has a cell
        return {"output": out, **{k: torch.zeros_like(x) for k, x in case.leaves.items()}}
    gradients = torch.autograd.grad(
        out, list(leaves.values()), case.grad_output, allow_unused=True, materialize_grads=True
    )
    return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def expected(case: Case) -> dict[str, Tensor]:
    """The output and the gradients, by the names of what they belong to, in float64."""
    wide = {k: x.double() for k, x in case.leaves.items()}
    case = replace(case.changed(**wide), grad_output=case.grad_output.double())
    return _with_gradients(_fused if case.is_fused else _classic, case)


# ---- what is compared with it ----


def computed(case: Case) -> dict[str, Tensor]:
    """As :func:`expected`, by the public functions with whatever kernels are active."""
    return _with_gradients(ms_deform_attn_fused if case.is_fused else ms_deform_attn, case)


def computed_by(operators: Any, case: Case, *, deterministic: bool = False) -> dict[str, Tensor]:
    """As :func:`expected`, by the operators of a compiled library."""
    name = "ms_deform_attn_fused" if case.is_fused else "ms_deform_attn"
    backward = f"{name}_backward_deterministic" if deterministic else f"{name}_backward"
    out = getattr(operators, f"{name}_forward")(*case.arguments)
    gradients = getattr(operators, backward)(case.grad_output, *case.arguments)
    return {"output": out, **dict(zip(case.leaves, gradients, strict=True))}


def assert_near(results: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> None:
    """Within the tolerance of the largest number of each tensor, and the rounding of each."""
    assert results.keys() == references.keys()
    for name, reference in references.items():
        result = results[name]
        assert result.shape == reference.shape
        if reference.numel():
            error = (result.double() - reference).abs()
            largest = reference.abs().max().clamp_min(1e-3)
            rounding = 1.01 * ROUNDING.get(result.dtype, 0) * reference.abs()
            excess = (error - rounding).max() / largest
            assert excess <= TOLERANCE.get(result.dtype, 1e-5), f"{name}: {excess:.2e}"
            if result.dtype in ROUNDING and reference.any():
                assert error.square().mean() <= 9e-6 * reference.square().mean(), name


def assert_same_bits(results: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert results.keys() == others.keys()
    for name, result in results.items():
        assert torch.equal(result.nan_to_num(), others[name].nan_to_num()), name


def strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with dimensions in memory in another order, and NaN or ones in gaps."""
    wide = tensor.permute(order)
    gaps = torch.full_like(wide, float("nan") if tensor.is_floating_point() else 1)
    inverse = [order.index(i) for i in range(tensor.dim())]
    return torch.stack([wide, gaps], wide.dim() - 1)[..., 0, :].permute(inverse)
