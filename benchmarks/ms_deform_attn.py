"""Speed and memory of multi-scale deformable attention: the compiled operators against grid_sample.

    python benchmarks/ms_deform_attn.py --threads 1 2 --json ms_deform_attn.json

Shapes: an 800 x 1066 image with four levels; the encoder has one query per cell (17 821), the
decoder 500. Ours and the reference run in turns, and the medians are compared. The reference is
what every project falls back to, grid_sample per level in float32 (in bfloat16 rows too: its half
types are wrong on CPUs). Cases:

    encoder, decoder     the operator, sampling locations and attention weights given
    ... fused            the operator from offsets, reference points and logits, softmax included
    module encoder       MSDeformAttn with its four linear layers; `linears` is their time alone

Peak memory is what a pass needs beyond its inputs, of a process of its own. Errors are the largest
of a tensor over its largest number, against float64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dn_detr

SHAPES = [(100, 134), (50, 67), (25, 34), (13, 17)]
HEADS, DIM, LEVELS, POINTS = 8, 32, 4, 4
CHANNELS = HEADS * DIM
DECODER_QUERIES = 500

SPATIAL_SHAPES = torch.tensor(SHAPES)
SIZES = SPATIAL_SHAPES.prod(1)
STARTS = SIZES.cumsum(0) - SIZES
CELLS = int(SIZES.sum())


class Inputs(NamedTuple):
    """Legend: B batch, S cells, H heads, D head dim, Q queries, L levels, P points."""

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


def make_inputs(case: str, batch: int) -> Inputs:
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
    return Inputs(value, references, offsets, logits, locations, weights, grad_output)


# ---- the two contestants ----


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


def eager_fused(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Softmax and location arithmetic as separate operations, then `eager`."""
    locations = references[:, :, None, :, None] + offsets / SPATIAL_SHAPES.flip(-1)[:, None]
    return eager(value, locations, logits.softmax(-1).unflatten(-1, (LEVELS, POINTS)))


@cache
def _operators() -> Any:
    torch.ops.load_library(str(Path(dn_detr.__file__).parent / "_C.so"))
    return torch.ops.dn_detr_C


class _Classic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        inputs = (value, SPATIAL_SHAPES, STARTS, locations, weights)
        ctx.save_for_backward(*inputs)
        return _operators().ms_deform_attn_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _operators().ms_deform_attn_backward(grad, *ctx.saved_tensors)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
    ) -> Tensor:
        inputs = (value, SPATIAL_SHAPES, STARTS, references, offsets, logits)
        ctx.save_for_backward(*inputs)
        return _operators().ms_deform_attn_fused_forward(*inputs, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _operators().ms_deform_attn_fused_backward(grad, *ctx.saved_tensors, None)


Core = Callable[..., Tensor]


def _operator_pass(core: Core, inputs: Inputs, case: str, gradients: bool, dtype: Any) -> Any:
    fields = (0, 1, 2, 3) if "fused" in case else (0, 4, 5)
    tensors = [inputs[i] for i in fields]
    tensors[0] = tensors[0].to(dtype)
    grad_output = inputs.grad_output.to(dtype)
    wanted = [i for i, field in enumerate(fields) if field != 1]  # reference points are constants

    def forward() -> Tensor:
        with torch.no_grad():
            return core(*tensors)

    def forward_backward() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        out = core(*leaves)
        return torch.autograd.grad(out, [leaves[i] for i in wanted], grad_output)

    return forward_backward if gradients else forward


def _module_pass(core: Core | None, inputs: Inputs, gradients: bool) -> Any:
    """The module around `core`; None: its linear layers alone, each with its gradients."""
    generator = torch.Generator().manual_seed(1)
    outputs = {"value": CHANNELS, "offsets": HEADS * LEVELS * POINTS * 2,
               "logits": HEADS * LEVELS * POINTS, "out": CHANNELS}  # fmt: skip
    matrices = {
        name: (torch.randn(n, CHANNELS, generator=generator) / 16).requires_grad_(gradients)
        for name, n in outputs.items()
    }
    batch, queries = inputs.offsets.shape[:2]
    query = torch.randn(batch, queries, CHANNELS, generator=generator)
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


def make_pass(core: str, case: str, inputs: Inputs, gradients: bool, dtype: Any) -> Any:
    """The function to time; `core` is "ours", "reference" or "linears"."""
    if "module" in case:
        cores = {"ours": _Fused.apply, "reference": eager_fused, "linears": None}
        return _module_pass(cores[core], inputs, gradients)
    fused = "fused" in case
    if core == "ours":
        apply = _Fused.apply if fused else _Classic.apply
        return _operator_pass(apply, inputs, case, gradients, dtype)
    reference = eager_fused if fused else eager
    return _operator_pass(reference, inputs, case, gradients, torch.float32)


# ---- measurements ----


def medians_ms(passes: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median times of functions that run in turns, after one round to warm up.

    One thread is timed by the processor time that it gets, so that other programs do not count.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            start = clock()
            run()
            if number:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _peak_in_this_process(
    core: str, case: str, batch: int, gradients: bool, dtype: Any, channel: Any
) -> None:
    torch.set_num_threads(1)
    run = make_pass(core, case, make_inputs(case, batch), gradients, dtype)
    if core == "ours":
        _operators()
    warm_up = torch.randn(1, 4, 8, 8, requires_grad=True)  # loads what every backward pass needs
    F.grid_sample(warm_up, torch.zeros(1, 8, 8, 2), align_corners=False).sum().backward()
    F.linear(warm_up, torch.randn(8, 8)).softmax(-1).sum().backward()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again without counting
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kb("VmRSS")
    kept = run()
    channel.send((_status_kb("VmHWM") - before) / 1024)
    del kept


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_mb(core: str, case: str, batch: int, gradients: bool, dtype: Any) -> float | None:
    """Memory that a pass needs beyond its inputs, in MiB; None where Linux's /proc is missing."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (core, case, batch, gradients, dtype, sender)
    process = context.Process(target=_peak_in_this_process, args=arguments)
    process.start()
    process.join()
    return receiver.recv() if receiver.poll() else None


def largest_error(case: str, batch: int, gradients: bool, dtype: Any) -> float:
    """Of ours against the reference in float64 on the same (rounded) inputs."""
    inputs = make_inputs(case, batch)
    rounded = inputs._replace(
        value=inputs.value.to(dtype).float(), grad_output=inputs.grad_output.to(dtype).float()
    )
    ours = make_pass("ours", case, rounded, gradients, dtype)()
    wide = Inputs(*(t.double() for t in rounded))
    reference = eager_fused if "fused" in case else eager
    exact = _operator_pass(reference, wide, case, gradients, torch.float64)()
    pairs = zip(ours, exact, strict=True) if gradients else [(ours, exact)]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(
    case: str, gradients: bool, batch: int, threads: int, dtype: Any, rounds: int, *, memory: bool
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    inputs = make_inputs(case, batch)
    names = ["ours", "reference"] + (["linears"] if "module" in case else [])
    passes = {name: make_pass(name, case, inputs, gradients, dtype) for name in names}
    times = medians_ms(passes, rounds)
    row: dict[str, Any] = {
        "case": case,
        "pass": "forward+backward" if gradients else "forward",
        "batch": batch,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ms": times["ours"],
        "reference_ms": times["reference"],
        "ratio": times["reference"] / times["ours"],
        "linears_ms": times.get("linears"),
        "over_linears": times["ours"] / times["linears"] if "linears" in times else None,
        "ours_peak_mb": None,
        "reference_peak_mb": None,
        "max_error": None,
    }
    if memory:
        row["ours_peak_mb"] = peak_mb("ours", case, batch, gradients, dtype)
        row["reference_peak_mb"] = peak_mb("reference", case, batch, gradients, dtype)
    if "module" not in case:
        row["max_error"] = largest_error(case, batch, gradients, dtype)
    return row


# ---- the table ----

COLUMNS = {  # name: width and format
    "case": (15, ""),
    "pass": (16, ""),
    "batch": (5, "d"),
    "threads": (7, "d"),
    "dtype": (8, ""),
    "ours_ms": (8, ".2f"),
    "reference_ms": (12, ".1f"),
    "ratio": (6, ".1f"),
    "over_linears": (12, ".2f"),
    "ours_peak_mb": (12, ".0f"),
    "reference_peak_mb": (17, ".0f"),
    "max_error": (9, ".1e"),
}


def _print_line(cells: dict[str, str]) -> None:
    texts = (
        cells[name].rjust(width) if kind else cells[name].ljust(width)
        for name, (width, kind) in COLUMNS.items()
    )
    print("  ".join(texts), flush=True)


def _print_row(row: dict[str, Any]) -> None:
    _print_line({
        name: "-" if row[name] is None else format(row[name], kind)
        for name, (_, kind) in COLUMNS.items()
    })  # fmt: skip


def machine() -> str:
    """Processor, kernels, torch, commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    kernels = _operators().cpu_kernels()
    date = time.strftime("%Y-%m-%d")
    return f"{cpu}, {kernels}, torch {torch.__version__}, {date}, commit {git.stdout.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=[
        "encoder", "encoder fused", "decoder", "decoder fused", "module encoder"])  # fmt: skip
    parser.add_argument("--kernels", default="", help="portable, avx2 or avx512; default: the best")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    args = parser.parse_args()
    _operators().use_cpu_kernels(args.kernels)
    print(machine(), file=sys.stderr)
    rows = []
    _print_line({name: name for name in COLUMNS})
    for threads in args.threads:
        for batch in args.batches:
            for case in args.cases:
                for dtype in args.dtypes if "module" not in case else ["float32"]:
                    for gradients in (False, True):
                        row = measure(
                            case, gradients, batch, threads, getattr(torch, dtype), args.rounds,
                            memory=not args.no_memory,
                        )  # fmt: skip
                        rows.append(row)
                        _print_row(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
