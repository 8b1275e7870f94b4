"""The compiled CPU operators against grid_sample in float64, for every instruction set here.

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dn_detr

LIBRARY = Path(dn_detr.__file__).parent / "_C.so"
if not LIBRARY.is_file():
    pytest.skip("the compiled operators are not built", allow_module_level=True)
torch.ops.load_library(str(LIBRARY))
COMPILED = torch.ops.dn_detr_C

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


@pytest.fixture(params=["portable", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = COMPILED.cpu_kernels()
    try:
        COMPILED.use_cpu_kernels(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    COMPILED.use_cpu_kernels(before)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


def computed(case: Case) -> tuple[Tensor, ...]:
    return (
        COMPILED.ms_deform_attn_forward(*case.inputs),
        *COMPILED.ms_deform_attn_backward(case.grad_output, *case.inputs),
    )


def computed_fused(case: FusedCase) -> tuple[Tensor, ...]:
    return (
        COMPILED.ms_deform_attn_fused_forward(*case.inputs),
        *COMPILED.ms_deform_attn_fused_backward(case.grad_output, *case.inputs),
    )


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


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_float64(instruction_set, dtype, queries):
    case = make_case(dtype, queries=queries)
    assert_agree(computed(case), expected(case))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_results_are_those_of_float64(instruction_set, dtype, queries, coordinates, masked):
    case = make_fused_case(dtype, queries=queries, coordinates=coordinates, masked=masked)
    assert_agree(computed_fused(case), expected_fused(case))


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("dim", [4, 8, 12, 16, 20, 24, 36, 48, 64, 68, 100, 128, 256])
def test_every_head_dim(instruction_set, dim, queries):
    case = make_case(dim=dim, queries=queries)
    assert_agree(computed(case), expected(case))
    fused = make_fused_case(torch.bfloat16, dim=dim, queries=queries, coordinates=2, masked=True)
    assert_agree(computed_fused(fused), expected_fused(fused))


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("points", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("levels", [1, 2, 5, 9])
def test_every_number_of_levels_and_points(instruction_set, levels, points, coordinates):
    shapes = [(6 - i // 2, 1 + i) for i in range(levels)]
    case = make_fused_case(
        shapes=shapes, points=points, queries=20, coordinates=coordinates, masked=False
    )
    assert_agree(computed_fused(case), expected_fused(case))


def test_levels_without_cells_read_zeros(instruction_set):
    for queries in (FEW, MANY):
        case = make_case(shapes=[(0, 3), (4, 5), (2, 0), (0, 0)], queries=queries)
        assert_agree(computed(case), expected(case))


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"points": 0}, {"shapes": []}, {"dim": 0}]
)
def test_empty_inputs_give_zeros(empty):
    case = make_case(**empty)
    for result in computed(case):
        assert not result.any()
    assert [x.shape for x in computed(case)[1:]] == [case[i].shape for i in (0, 3, 4)]
    fused = make_fused_case(**empty, coordinates=2, masked=True)
    for result in computed_fused(fused):
        assert not result.any()


def _strided(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers with the dimensions in memory in another order, and gaps between them."""
    wide = torch.stack([tensor.permute(order)] * 2)[0]
    wide = torch.cat([wide, wide], 0)[: wide.shape[0]].contiguous()
    inverse = [order.index(i) for i in range(tensor.dim())]
    return wide.permute(inverse)


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("order", ["heads first", "innermost last", "queries first"])
def test_strided_inputs(order, queries):
    case = make_case(queries=queries)
    orders = {
        "heads first": ((2, 0, 1, 3), (2, 0, 1, 3, 4, 5), (2, 0, 1, 3, 4), (1, 0, 2)),
        "innermost last": ((3, 2, 1, 0), (5, 4, 3, 2, 1, 0), (4, 3, 2, 1, 0), (2, 1, 0)),
        "queries first": ((1, 0, 2, 3), (1, 0, 2, 3, 4, 5), (1, 2, 0, 3, 4), (1, 0, 2)),
    }[order]
    value, locations, weights, grad_output = (
        _strided(case[i], o) for i, o in zip((0, 3, 4, 5), orders, strict=True)
    )
    shapes = case.spatial_shapes.t().contiguous().t()
    starts = torch.stack([case.level_start_index] * 2, 1)[:, 0]
    strided = Case(value, shapes, starts, locations, weights, grad_output)
    assert_same_bits(computed(strided), computed(case))


def test_expanded_inputs():
    case = make_fused_case(coordinates=2, masked=True, queries=MANY)
    case = case._replace(
        reference_points=case.reference_points[:1, :, :1].expand_as(case.reference_points),
        padding_mask=case.padding_mask[:1].expand_as(case.padding_mask),
        grad_output=torch.ones(()).expand_as(case.grad_output),
    )
    dense = case._replace(
        **{k: getattr(case, k).contiguous() for k in ("reference_points", "padding_mask")},
        grad_output=case.grad_output.contiguous(),
    )
    assert_same_bits(computed_fused(case), computed_fused(dense))


@pytest.mark.parametrize("queries", [FEW, MANY, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(threads, dtype, queries):
    case = make_case(dtype, queries=queries)
    fused = [make_fused_case(dtype, queries=queries, coordinates=n, masked=True) for n in (2, 4)]
    threads(1)
    alone = computed(case), *map(computed_fused, fused)
    for count in (2, 3, 5, 40):
        threads(count)
        together = computed(case), *map(computed_fused, fused)
        for results, others in zip(together, alone, strict=True):
            assert_same_bits(results, others)


NOT_INSIDE = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e9]


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("number", NOT_INSIDE)
@pytest.mark.parametrize("coordinate", [0, 1])
def test_locations_that_are_not_finite_sample_zero(instruction_set, number, coordinate, queries):
    case = make_case(queries=queries)
    case.locations[:, ::2, ..., 1, coordinate] = number
    without = case._replace(weights=case.weights.clone(), locations=case.locations.clone())
    without.weights[:, ::2, ..., 1] = 0
    without.locations[:, ::2, ..., 1, :] = 0.5
    out, grad_value, grad_locations, grad_weights = computed(case)
    assert torch.equal(out, COMPILED.ms_deform_attn_forward(*without.inputs))
    assert torch.equal(grad_value, computed(without)[1])
    assert not grad_locations[:, ::2, ..., 1, :].any()
    assert not grad_weights[:, ::2, ..., 1].any()


@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_cells_without_weight_may_be_anything(instruction_set, number, queries):
    # Query 0 samples the centre of cell (1, 1), where the other three corners weigh nothing; the
    # last one gives a cell that is not finite no attention. Sizes are powers of two: exact.
    case = make_case(shapes=[(4, 8)], points=1, queries=queries)
    case.locations[:] = (torch.tensor([1.0, 1.0]) + 0.5) / torch.tensor([8.0, 4.0])
    case.locations[:, -1] = (torch.tensor([5.2, 2.3]) + 0.5) / torch.tensor([8.0, 4.0])
    case.weights[:, -1] = 0
    clean = computed(case)
    poisoned = case._replace(value=case.value.clone())
    poisoned.value[:, [10, 17, 18, 21, 22, 29, 30]] = number
    out, grad_value, _, grad_weights = computed(poisoned)
    assert torch.equal(out, clean[0])
    assert torch.equal(grad_value, clean[1])
    assert torch.equal(grad_weights[:, :-1], clean[3][:, :-1])


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_cells_that_are_not_finite_reach_whoever_reads_them(instruction_set, queries):
    case = make_case(queries=queries)
    case.value[0, 3] = float("nan")
    out = COMPILED.ms_deform_attn_forward(*case.inputs)
    reads = reference_forward(case._replace(value=(case.value != case.value).double())) != 0
    assert torch.equal(out.isnan(), reads)


@pytest.mark.parametrize("queries", [FEW, MANY])
def test_masked_cells_read_as_zeros_whatever_they_are(instruction_set, queries):
    case = make_fused_case(coordinates=2, masked=True, queries=queries)
    clean = computed_fused(case)
    case.value[case.padding_mask] = float("nan")
    assert_same_bits(computed_fused(case), clean)
    assert not clean[1][case.padding_mask].any()


class Classic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return COMPILED.ms_deform_attn_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, locations, weights = COMPILED.ms_deform_attn_backward(grad, *ctx.saved_tensors)
        return value, None, None, locations, weights


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return COMPILED.ms_deform_attn_fused_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        value, *others = COMPILED.ms_deform_attn_fused_backward(grad, *ctx.saved_tensors)
        return value, None, None, *others, None


@pytest.mark.parametrize("queries", [2, 30])
def test_gradients_are_finite_differences(queries):
    case = make_case(
        torch.float64, shapes=[(3, 4), (1, 2)], batch=1, queries=queries, dim=4, points=2
    )
    inputs = [x.requires_grad_(x.is_floating_point()) for x in case.inputs]
    assert torch.autograd.gradcheck(Classic.apply, inputs)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("queries", [2, 30])
def test_fused_gradients_are_finite_differences(queries, coordinates):
    case = make_fused_case(
        torch.float64, shapes=[(3, 4), (1, 2)], batch=1, queries=queries, heads=1, dim=4, points=2,
        coordinates=coordinates, masked=True,
    )  # fmt: skip
    inputs = [x.requires_grad_(x.is_floating_point()) for x in case.inputs]
    assert torch.autograd.gradcheck(Fused.apply, inputs)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    heads=st.integers(1, 3),
    quarter_dim=st.integers(1, 20),
    points=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(shapes, batch, queries, heads, quarter_dim, points, dtype, seed):
    kwargs = dict(
        shapes=shapes, batch=batch, queries=queries, heads=heads, dim=4 * quarter_dim,
        points=points, seed=seed,
    )  # fmt: skip
    case = make_case(dtype, **kwargs)
    assert_agree(computed(case), expected(case))
    fused = make_fused_case(dtype, **kwargs, coordinates=2 + 2 * (seed % 2), masked=seed % 3 == 0)
    assert_agree(computed_fused(fused), expected_fused(fused))


def _replaced(index: int, change: Any) -> list[Tensor]:
    inputs = list(make_case().inputs)
    inputs[index] = change(inputs[index])
    return inputs


@pytest.mark.parametrize(
    ("index", "change", "complaint"),
    [
        (0, lambda x: x[0], "value"),
        (0, lambda x: x.long(), "value must be float32"),
        (0, lambda x: x[..., :6], "head dim 6"),
        (0, lambda x: x.repeat(1, 1, 1, 9), "head dim 288"),
        (0, lambda x: x[:, 1:], "spatial_shapes"),
        (0, lambda x: torch.cat([x, x], 1), "spatial_shapes add up to"),
        (0, lambda x: x[:1], "sampling_locations"),
        (0, lambda x: x[:, :, :1], "sampling_locations"),
        (0, lambda x: x.double(), "sampling_locations must be float64"),
        (1, lambda x: x.int(), "spatial_shapes must be int64"),
        (1, lambda x: x[:, :1], "spatial_shapes"),
        (1, lambda x: -x, "spatial_shapes: level 0 of -5 x -7"),
        (1, lambda x: x * 2**40, "spatial_shapes"),
        (1, lambda x: x + 2**62, "spatial_shapes"),
        (1, lambda x: x[:-1], "level_start_index"),
        (2, lambda x: x + 1, "level_start_index: level 0 must start at 0"),
        (2, lambda x: x.float(), "level_start_index must be int64"),
        (2, lambda x: x[:-1], "level_start_index"),
        (3, lambda x: x[..., 0], "sampling_locations"),
        (3, lambda x: x[..., :1], "sampling_locations"),
        (3, lambda x: x[:, :, :, 1:], "sampling_locations"),
        (3, lambda x: x.bfloat16(), "sampling_locations must be float32"),
        (4, lambda x: x[:, :-1], "attention_weights"),
        (4, lambda x: x.double(), "attention_weights must be float32"),
    ],
)
def test_errors_name_the_argument(index, change, complaint):
    inputs = _replaced(index, change)
    with pytest.raises(ValueError, match=complaint):
        COMPILED.ms_deform_attn_forward(*inputs)
    with pytest.raises(ValueError, match=complaint):
        COMPILED.ms_deform_attn_backward(make_case().grad_output, *inputs)


@pytest.mark.parametrize(
    ("field", "change", "complaint"),
    [
        ("reference_points", lambda x: x[..., :1], "1 coordinates"),
        ("reference_points", lambda x: x[:, :-1], "reference_points"),
        ("offsets", lambda x: x[:, :, :, :-1], "offsets"),
        ("logits", lambda x: x[..., :-1], "logits"),
        ("logits", lambda x: x.half(), "logits must be float32"),
        ("padding_mask", lambda x: x.float(), "padding_mask must be bool"),
        ("padding_mask", lambda x: x[:, :-1], "padding_mask"),
        ("grad_output", lambda x: x[..., :-1], "grad_output"),
        ("grad_output", lambda x: x.half(), "grad_output must have the type of value"),
    ],
)
def test_errors_of_the_fused_operator_name_the_argument(field, change, complaint):
    case = make_fused_case(coordinates=2, masked=True)
    case = case._replace(**{field: change(getattr(case, field))})
    with pytest.raises(ValueError, match=complaint):
        computed_fused(case)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="no kernels called sse9"):
        COMPILED.use_cpu_kernels("sse9")


def test_sizes_of_levels_are_summed_in_order():
    """A level must begin where the one before it ends, also if another order would fit."""
    case = make_case()
    starts = torch.tensor([0, *accumulate(case.spatial_shapes.prod(1).tolist())][:-1])
    assert torch.equal(starts, case.level_start_index)
    with pytest.raises(ValueError, match="level_start_index: level 1"):
        COMPILED.ms_deform_attn_forward(
            case.value, case.spatial_shapes, starts[[0, 2, 1, 3]], case.locations, case.weights
        )
