"""Random arguments of the deformable-attention operators, drawn from a seed; valid ones and others.

Legend: B batch, S cells of all levels, H heads, D head dim, Q queries, L levels, P points.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dn_detr.ops import eager

MAX_NUMBERS = 150_000  # of the values, and of the samples: a case takes milliseconds
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_TYPES = (*TYPES, torch.int64, torch.int32, torch.bool, torch.complex64)
NAN, INF = float("nan"), float("inf")
# Locations, offsets and reference points that put a sample outside every map.
FAR = (1e30, -1e30, 3e38, -3e38, 1e9, -(2.0**31), 2.0**31, 2.0**63)
NOT_FINITE = (NAN, INF, -INF)
EXTREME_INTEGERS = (-1, 1, -(2**31), 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)


@dataclass
class Case:
    """One call of a forward and a backward operator.

    Attributes:
        tensors: arguments by name, in the order of the operator.
        grad_output: (B, Q, H * D).
        kernels: the instruction set to use; one that is missing stands for the best one.
        threads: how many to use.
        same_numbers: names of results that must agree with float64. Gradients of locations jump
            where a sample lies on the border of a cell; what is not finite may turn out either way.
        notes: what is unusual about the case.
    """

    tensors: dict[str, Tensor | None]
    grad_output: Tensor
    kernels: str
    threads: int
    same_numbers: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        return "offsets" in self.tensors

    @property
    def floats(self) -> list[str]:
        """Names of the arguments that have gradients."""
        names = (name for name in self.tensors if name != "padding_mask")
        return ["value", *list(names)[3:]]

    def error(self) -> str | None:
        """Why the operators must refuse the arguments, as far as the forward one sees them."""
        try:
            self._check()
        except ValueError as error:
            return str(error)
        return None

    def _check(self) -> None:
        value, shapes, starts, *others = self.tensors.values()
        assert value is not None and shapes is not None and starts is not None
        check = eager.check_fused_inputs if self.fused else eager.check_inputs
        check(value, shapes, starts, *others)
        if value.shape[-1] % 4 or value.shape[-1] > 256:
            raise ValueError("value has another head dim than the compiled kernels")
        wanted = (eager.working_type(value), torch.bool)
        if any(x is not None and x.dtype not in wanted for x in others):
            raise ValueError("coordinates have another type than the arithmetic")

    def grad_error(self) -> str | None:
        """Why the backward operator must refuse `grad_output`, if all else is right."""
        value = self.tensors["value"]
        samples = self.tensors["offsets" if self.fused else "sampling_locations"]
        assert value is not None and samples is not None
        expected = (value.shape[0], samples.shape[1], value.shape[2] * value.shape[3])
        if tuple(self.grad_output.shape) != expected or self.grad_output.dtype != value.dtype:
            return "grad_output does not fit"
        return None


@dataclass
class Sizes:
    """Of one case; `reference` is 0 for the classic operator, else coordinates."""

    shapes: list[tuple[int, int]]
    batch: int
    heads: int
    dim: int
    queries: int
    points: int
    reference: int


def draw(seed: int) -> Case:
    """The case of a seed, the same one on every machine up to missing instruction sets."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = _draw_sizes(rng)
    dtype = rng.choice(TYPES)
    tensors, grad_output = _draw_tensors(rng, generator, sizes, dtype)
    case = Case(
        tensors,
        grad_output,
        kernels=rng.choice(["portable", "avx2", "avx512"]),
        threads=rng.choice([1, 1, 2, 3, 5, 8, 40]),
        notes=[f"{sizes} {dtype}"],
    )
    case.same_numbers = {"output", *case.floats}
    for chance, change in (
        (0.15, _put_on_borders),
        (0.25, _put_outside),
        (0.1, _extreme_logits),
        (0.1, _poison_masked),
        (0.1, _poison),
    ):
        if rng.random() < chance:
            change(rng, case)
    _lay_out(rng, case)
    if rng.random() < 0.3:
        _mutate(rng, case)
    return case


# ---- sizes --------------------------------------------------------------------------------------


def _draw_shape(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    if kind < 0.15:
        return 1, 1
    if kind < 0.2:
        sides = [0, rng.choice([0, 1, 5, 2**20, eager.MAX_SIDE])]
        rng.shuffle(sides)
        return sides[0], sides[1]
    if kind < 0.3:
        sides = [1, rng.randint(2, 60)]
        rng.shuffle(sides)
        return sides[0], sides[1]
    return rng.randint(1, 12), rng.randint(1, 12)


def _draw_sizes(rng: random.Random) -> Sizes:
    shapes = [_draw_shape(rng) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4, 4, 4, 5, 20]))]
    sizes = Sizes(
        shapes=shapes,
        batch=0 if rng.random() < 0.02 else rng.randint(1, 3),
        heads=0 if rng.random() < 0.02 else rng.randint(1, 5),
        dim=rng.choice([16, 32, 64, 4 * rng.randint(1, 16), 4 * rng.randint(0, 64)]),
        queries=0
        if rng.random() < 0.02
        else rng.choice([1, rng.randint(1, 5), rng.randint(1, 90)]),
        points=0 if rng.random() < 0.02 else rng.choice([1, 2, 4, 4, 8, rng.randint(1, 20)]),
        reference=rng.choice([0, 2, 4]),
    )
    if rng.random() < 0.03:
        sizes.dim = rng.randint(1, 300)
    cells = sum(h * w for h, w in shapes)
    samples = sizes.queries * len(shapes) * sizes.points
    for name in ("batch", "heads", "dim"):  # smaller, until the case is quick
        if sizes.batch * sizes.heads * sizes.dim * max(cells, samples) > MAX_NUMBERS:
            setattr(sizes, name, min(getattr(sizes, name), 4 if name == "dim" else 1))
    return sizes


# ---- numbers ------------------------------------------------------------------------------------


def _cells(grid: tuple[int, ...], sizes_wh: Tensor, generator: torch.Generator) -> Tensor:
    """Positions in cells, up to two cells outside, none where gradients of locations jump."""
    position = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * (sizes_wh + 3) - 2
    fraction = torch.rand(*grid, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return position.floor() + fraction


def _draw_tensors(
    rng: random.Random, generator: torch.Generator, sizes: Sizes, dtype: torch.dtype
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Arguments and gradient of the output, all valid but perhaps the head dim."""
    shapes = torch.tensor(sizes.shapes, dtype=torch.int64).reshape(-1, 2)
    areas = shapes.prod(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grid = (sizes.batch, sizes.queries, sizes.heads, len(shapes), sizes.points)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    value = normal(sizes.batch, int(areas.sum()), sizes.heads, sizes.dim).to(dtype)
    tensors: dict[str, Tensor | None] = {
        "value": value,
        "spatial_shapes": shapes,
        "level_start_index": areas.cumsum(0) - areas,
    }
    sizes_wh = shapes.flip(-1).double()[:, None].clamp(1, 100)
    locations = (_cells(grid, sizes_wh, generator) + 0.5) / sizes_wh
    if sizes.reference == 0:
        weights = torch.rand(grid, generator=generator)
        tensors["sampling_locations"] = locations.to(wide)
        tensors["attention_weights"] = (weights * (weights > 0.1)).to(wide)
    else:
        references = torch.rand(*grid[:2], len(shapes), sizes.reference, generator=generator)
        references = references * 0.5 + 0.2
        around = references.double()[:, :, None, :, None]
        scale = sizes_wh if sizes.reference == 2 else 2 * sizes.points / around[..., 2:]
        tensors["reference_points"] = references.to(wide)
        tensors["offsets"] = ((locations - around[..., :2]) * scale).to(wide)
        tensors["logits"] = (2 * normal(*grid[:3], len(shapes) * sizes.points)).to(wide)
        masked = torch.rand(value.shape[:2], generator=generator) < rng.choice([0.0, 0.3, 1.0])
        tensors["padding_mask"] = masked if rng.random() < 0.6 else None
    return tensors, normal(sizes.batch, sizes.queries, sizes.heads * sizes.dim).to(dtype)


def _scatter(rng: random.Random, tensor: Tensor, numbers: tuple[float, ...]) -> None:
    """Overwrites some elements, from one to all."""
    if tensor.numel():
        flat = tensor.view(-1)
        for _ in range(rng.choice([1, 3, 30])):
            first = rng.randrange(len(flat))
            last = first + rng.choice([1, 1, 2, 8, len(flat)])
            flat[first:last] = rng.choice(numbers)


def _put_on_borders(rng: random.Random, case: Case) -> None:
    """Samples at centres of cells and at the edge of the map, or one step of rounding beside."""
    samples = case.tensors.get("sampling_locations")
    if samples is None or samples.numel() == 0:
        return
    shapes = case.tensors["spatial_shapes"]
    assert shapes is not None
    sizes_wh = shapes.flip(-1).double()[:, None].clamp(1, 100)
    cells = (samples.double() * sizes_wh).floor().clamp_min(-1).minimum(sizes_wh)
    exact = ((cells + rng.choice([-0.5, 0.5])) / sizes_wh).to(samples.dtype)
    direction = rng.choice([None, -INF, INF])
    if direction is not None:
        exact = exact.nextafter(torch.full_like(exact, direction))
    samples.copy_(exact)
    case.same_numbers.discard("sampling_locations")
    case.notes.append("on borders")


def _put_outside(rng: random.Random, case: Case) -> None:
    """Numbers that are not finite or far too large."""
    names = ["reference_points", "offsets"] if case.fused else ["sampling_locations"]
    name = rng.choice(names)
    tensor = case.tensors[name]
    assert tensor is not None
    _scatter(rng, tensor, FAR)
    case.notes.append(f"far {name}")
    if rng.random() < 0.5:
        return
    _scatter(rng, tensor, NOT_FINITE)
    case.notes.append(f"{name} not finite")
    references = case.tensors.get("reference_points")
    if references is not None and references.shape[-1] == 4:
        # Gradients of boxes and offsets have each other as a factor: 0 * inf is NaN, or 0 on CUDA.
        case.same_numbers -= {"reference_points", "offsets"}


def _extreme_logits(rng: random.Random, case: Case) -> None:
    logits = case.tensors.get("logits")
    if logits is not None:
        _scatter(rng, logits, (-90.0, 90.0, 1e4, -1e4, 1e-30))
        case.notes.append("extreme logits")


def _poison_masked(rng: random.Random, case: Case) -> None:
    """Padding may hold anything."""
    value, mask = case.tensors["value"], case.tensors.get("padding_mask")
    if value is not None and mask is not None:
        value[mask] = rng.choice([NAN, INF, -INF])
        case.notes.append("masked cells are not finite")


def _poison(rng: random.Random, case: Case) -> None:
    """Numbers that are not finite anywhere, where only crashes and threads are of interest."""
    tensors = {name: x for name, x in case.tensors.items() if x is not None}
    floats = [name for name, x in tensors.items() if x.is_floating_point()]
    for name in rng.sample([*floats, "grad_output"], 2):
        tensor = tensors.get(name, case.grad_output)
        _scatter(rng, tensor, (NAN, INF, -INF, 3e38, -3e38, 1e-45, -0.0))
        case.notes.append(f"poisoned {name}")
    case.same_numbers.clear()


# ---- memory -------------------------------------------------------------------------------------


def _gaps(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers with gaps of ones (0xff) between them, beginning anywhere."""
    if x.dim() == 0:
        return x
    dim = rng.randrange(x.dim())
    before, after = rng.randint(0, 3), rng.randint(0, 3)
    size = list(x.shape)
    size[dim] += before + after
    wide = torch.full(size, 1 if x.dtype == torch.bool else -1, dtype=x.dtype)
    if x.is_floating_point():
        wide.fill_(NAN)
    view = wide.narrow(dim, before, x.shape[dim])
    return view.copy_(x)


def _reorder(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers with the dimensions in memory in another order."""
    order = rng.sample(range(x.dim()), x.dim())
    inverse = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _every_second(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers, every second one of one dimension of a larger tensor."""
    if x.dim() == 0:
        return x
    dim = rng.randrange(x.dim())
    return torch.stack([x, torch.zeros_like(x)], dim + 1).select(dim + 1, 0)


LAYOUTS: tuple[Callable[[random.Random, Tensor], Tensor], ...] = (_gaps, _reorder, _every_second)


def _lay_out(rng: random.Random, case: Case) -> None:
    """Other strides and storage offsets; some dimensions without a stride."""
    for name, x in case.tensors.items():
        if x is not None and rng.random() < 0.3:
            case.tensors[name] = rng.choice(LAYOUTS)(rng, x)
            case.notes.append(f"strided {name}")
    if rng.random() < 0.3:
        case.grad_output = rng.choice(LAYOUTS)(rng, case.grad_output)
    for name in ("value", "padding_mask"):
        x = case.tensors.get(name)
        if x is not None and rng.random() < 0.05 and x.shape[0]:
            case.tensors[name] = x[:1].expand_as(x)
            case.notes.append(f"expanded {name}")
    if rng.random() < 0.05 and case.grad_output.numel():
        case.grad_output = case.grad_output[:1, :1, :1].expand_as(case.grad_output)


# ---- arguments that do not fit ------------------------------------------------------------------


def _shorter(rng: random.Random, x: Tensor) -> Tensor:
    dim = rng.randrange(x.dim())
    return x.narrow(dim, 0, max(x.shape[dim] - rng.randint(1, 4), 0))


def _longer(rng: random.Random, x: Tensor) -> Tensor:
    return torch.cat([x, x], rng.randrange(x.dim()))


def _transposed(rng: random.Random, x: Tensor) -> Tensor:
    return x.transpose(rng.randrange(x.dim()), rng.randrange(x.dim()))


def _other_rank(rng: random.Random, x: Tensor) -> Tensor:
    if x.shape[0] and rng.random() < 0.4:
        return x[0]
    return x.flatten() if rng.random() < 0.5 else x.unsqueeze(rng.randint(0, x.dim()))


def _other_type(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(OTHER_TYPES))


def _other_integers(rng: random.Random, x: Tensor) -> Tensor:
    """Adds, multiplies or writes a number that overflows, swaps rows, or is off by one."""
    if x.dtype != torch.int64 or x.numel() == 0:
        return _other_type(rng, x)
    x = x.clone(memory_format=torch.contiguous_format)
    number = rng.choice(EXTREME_INTEGERS)
    kind = rng.randrange(6)
    if kind == 0:
        return x + number
    if kind == 1:
        return x * number
    if kind == 2:
        return x.flip(0)
    flat = x.view(-1)
    if kind == 3:
        flat[rng.randrange(len(flat))] = number
    else:
        flat[rng.choice([-1, rng.randrange(len(flat))])] += rng.choice([-1, 1])
    return x


MUTATIONS: tuple[Callable[[random.Random, Tensor], Tensor], ...] = (
    _shorter,
    _longer,
    _transposed,
    _other_rank,
    _other_type,
    _other_integers,
)


def _mutate(rng: random.Random, case: Case) -> None:
    """Changes one argument; what remains valid must still not crash."""
    name = rng.choice([*(name for name, x in case.tensors.items() if x is not None), "grad_output"])
    mutation = rng.choice(MUTATIONS)
    if name in ("spatial_shapes", "level_start_index") and rng.random() < 0.5:
        mutation = _other_integers
    if name == "grad_output":
        case.grad_output = mutation(rng, case.grad_output)
    else:
        tensor = case.tensors[name]
        assert tensor is not None
        case.tensors[name] = mutation(rng, tensor)
    case.same_numbers.clear()
    case.notes.append(f"{mutation.__name__.lstrip('_')} {name}")
