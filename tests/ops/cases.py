"""Random inputs of the deformable-attention operators, and what they give in float64.

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {  # of the largest number of a tensor
    torch.float32: 1e-5,
    torch.float64: 1e-13,
    torch.bfloat16: 2**-8,  # half a unit in the last place
    torch.float16: 2**-11,
}
# Few queries read the values as they lie, many a packed copy.
FEW, MANY = 3, 60
SHAPES = [(5, 7), (3, 4), (1, 2), (1, 1)]


class Case(NamedTuple):
    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self[:5])


class FusedCase(NamedTuple):
    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    reference_points: Tensor
    offsets: Tensor
    logits: Tensor
    padding_mask: Tensor | None
    grad_output: Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return tuple(self[:7])


def _coordinate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cells(grid: tuple[int, ...], shapes: Tensor, generator: torch.Generator) -> Tensor:
    """Sampling positions in cells, up to two cells outside, none near a kink of the samples.

    Where the fraction of a cell is zero the gradient jumps, and rounding decides the side.
    """
    size_wh = shapes.flip(-1).double()[:, None]  # (L, 1, 2)
    position = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * (size_wh + 3) - 2
    fraction = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return position.floor() + fraction


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    shapes: Any = SHAPES,
    batch: int = 2,
    queries: int = FEW,
    heads: int = 2,
    dim: int = 32,
    points: int = 4,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2)
    sizes = spatial_shapes.prod(1)
    starts = sizes.cumsum(0) - sizes
    value = torch.randn(batch, int(sizes.sum()), heads, dim, generator=generator).to(dtype)
    grid = (batch, queries, heads, len(shapes), points)
    size_wh = spatial_shapes.flip(-1).double()[:, None].clamp_min(1)
    locations = (_cells(grid, spatial_shapes, generator) + 0.5) / size_wh
    weights = torch.rand(grid, generator=generator)
    grad_output = torch.randn(batch, queries, heads * dim, generator=generator).to(dtype)
    wide = _coordinate_type(dtype)
    return Case(value, spatial_shapes, starts, locations.to(wide), weights.to(wide), grad_output)


def make_fused_case(
    dtype: torch.dtype = torch.float32, *, coordinates: int, masked: bool, **kwargs: Any
) -> FusedCase:
    case = make_case(dtype, **kwargs)
    generator = torch.Generator().manual_seed(kwargs.get("seed", 0) + 1)
    batch, queries, _, levels, points, _ = case.locations.shape
    wide = _coordinate_type(dtype)
    references = torch.rand(batch, queries, levels, coordinates, generator=generator).to(wide)
    references = references * 0.5 + 0.2
    size_wh = case.spatial_shapes.flip(-1).double()[:, None]
    around = references.double()[:, :, None, :, None]
    offsets = case.locations.double() - around[..., :2]
    offsets = offsets * (size_wh if coordinates == 2 else 2 * points / around[..., 2:])
    logits = torch.randn(*case.weights.shape[:3], levels * points, generator=generator).to(wide)
    mask = torch.rand(case.value.shape[:2], generator=generator) < 0.3 if masked else None
    return FusedCase(
        *case.inputs[:3], references, offsets.to(wide), 2 * logits, mask, case.grad_output
    )


def reference_forward(case: Case) -> Tensor:
    """float64, differentiable: one grid_sample per level."""
    batch, queries, heads, _, _, _ = case.locations.shape
    out = case.value.new_zeros(batch, queries, heads, case.value.shape[-1], dtype=torch.float64)
    for level, (height, width) in enumerate(case.spatial_shapes.tolist()):
        if height * width == 0:
            continue
        start = int(case.level_start_index[level])
        cells = case.value[:, start : start + height * width].double()
        maps = cells.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        grid = (2 * case.locations[:, :, :, level].double() - 1).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, grid, align_corners=False)  # (B * H, D, Q, P)
        weights = case.weights[:, :, :, level].double().transpose(1, 2).flatten(0, 1)[:, None]
        out = out + (samples * weights).sum(-1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
    return out.flatten(2)


def reference_fused(case: FusedCase) -> Tensor:
    value = case.value.double()
    if case.padding_mask is not None:
        value = value.masked_fill(case.padding_mask[..., None, None], 0.0)
    _, _, _, levels, points, _ = case.offsets.shape
    references = case.reference_points.double()[:, :, None, :, None]
    if references.shape[-1] == 2:
        locations = references + case.offsets / case.spatial_shapes.flip(-1)[:, None].double()
    else:
        locations = references[..., :2] + case.offsets / points * references[..., 2:] * 0.5
    weights = case.logits.double().softmax(-1).unflatten(-1, (levels, points))
    shapes_and_starts = (case.spatial_shapes, case.level_start_index)
    return reference_forward(Case(value, *shapes_and_starts, locations, weights, case.grad_output))


def with_gradients(case: Any, reference: Any, wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The reference's output and its gradients with respect to the fields `wanted`."""
    fields = [x.double() if i in wanted else x for i, x in enumerate(case)]
    for i in wanted:
        fields[i] = fields[i].detach().requires_grad_()
    out = reference(type(case)(*fields))
    leaves = [fields[i] for i in wanted]
    gradients = torch.autograd.grad(
        out, leaves, case.grad_output.double(), allow_unused=True, materialize_grads=True
    )
    return (out.detach(), *gradients)


def expected(case: Case) -> tuple[Tensor, ...]:
    return with_gradients(case, reference_forward, (0, 3, 4))


def expected_fused(case: FusedCase) -> tuple[Tensor, ...]:
    return with_gradients(case, reference_fused, (0, 3, 4, 5))


def strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with the dimensions in memory in another order, and gaps between them."""
    wide = torch.stack([tensor.permute(order)] * 2)[0]
    wide = torch.cat([wide, wide], 0)[: wide.shape[0]].contiguous()
    inverse = [order.index(i) for i in range(tensor.dim())]
    return wide.permute(inverse)


def assert_agree(results: tuple[Tensor, ...], references: tuple[Tensor, ...]) -> None:
    for number, (result, reference) in enumerate(zip(results, references, strict=True)):
        assert result.shape == reference.shape
        if reference.numel():
            error = (result.double() - reference).abs().max()
            largest = reference.abs().max().clamp_min(1e-3)
            limit = TOLERANCE[result.dtype] * 1.05 + TOLERANCE[torch.float32]
            if result.dtype == torch.float64:
                limit = TOLERANCE[torch.float64]
            assert error / largest <= limit, f"result {number}: error {error / largest:.2e}"


def assert_same_bits(results: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result.nan_to_num(), other.nan_to_num())
