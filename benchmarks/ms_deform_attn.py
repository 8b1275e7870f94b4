"""Speed and memory of multi-scale deformable attention: the compiled operators against grid_sample.

    python benchmarks/ms_deform_attn.py --threads 1 2 --json ms_deform_attn.json
    python benchmarks/ms_deform_attn.py --device cuda

Shapes: an 800 x 1066 image with four levels; the encoder has one query per cell (17 821), the
decoder 500. Ours, through the public functions of dn_detr.ops, and the reference run in turns, and
the medians are compared. The reference is what every project falls back to, grid_sample per level:
on CPUs in float32 (in bfloat16 rows too: its half types are wrong there), on GPUs in float32 or in
the row's type, whichever is faster. Cases:

    encoder, decoder     the operator, sampling locations and attention weights given
    ... fused            the operator from offsets, reference points and logits, softmax included
    module encoder       MSDeformAttn's four linear layers around it; /linears: over their time

"must" and "aim" are limits of the ratio, of "/linears", or with two threads of "/1 thread", the
speed over that of one thread; "reached" says which of them is met. Peak memory is what a pass needs
beyond its inputs, on a CPU of a process of its own. Errors are the largest of a tensor over its
largest number, against float64. GPU times are those of calls queued one after the other, without
launching them; "launch" is the program's own time for one call; "/floor" is the time over the least
that an H200 can take.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_cases import BACKWARD, BOTH, FORWARD, largest_error, make_inputs, make_pass
from attention_targets import floor_ms, peak_must_mb, target
from timing import (
    gpu_seconds,
    launch_seconds,
    machine,
    medians,
    memory_mb,
    seconds,
    thread_seconds,
)

from dn_detr.allocator import keep_freed_memory
from dn_detr.ops import missing_kernels, ms_deform_attn

Row = dict[str, Any]
CASES = ("encoder", "encoder fused", "decoder", "decoder fused", "module encoder")
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float32", "float16", "bfloat16"]}
DIRECTIONS = {"cpu": (FORWARD, BOTH), "cuda": (FORWARD, BACKWARD, BOTH)}


# ---- memory ----


def _warm_up() -> None:
    """Loads what every pass needs."""
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    F.grid_sample(x, torch.zeros(1, 8, 8, 2), align_corners=False).sum().backward()
    F.linear(x, torch.randn(8, 8)).softmax(-1).sum().backward()
    one = torch.ones(1, 1, dtype=torch.int64)
    value = torch.randn(1, 1, 1, 4, requires_grad=True)
    weights = torch.ones(1, 1, 1, 1, 1)
    locations = torch.zeros(1, 1, 1, 1, 1, 2)
    ms_deform_attn(value, one.expand(1, 2), one[0] - 1, locations, weights).sum().backward()


def _peak_in_this_process(
    core: str, case: str, batch: int, direction: str, dtype: torch.dtype, channel: Any
) -> None:
    torch.set_num_threads(1)
    run = make_pass(core, case, make_inputs(case, batch), direction, dtype)
    _warm_up()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again without counting
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory_mb("VmRSS")
    kept = run()
    channel.send(memory_mb("VmHWM") - before)
    del kept


def peak_mb(
    core: str, case: str, batch: int, direction: str, dtype: torch.dtype, device: str
) -> float | None:
    """Memory that a pass needs beyond its inputs, in MiB; None where Linux's /proc is missing."""
    if device == "cuda":
        return _gpu_peak_mb(core, case, batch, direction, dtype)
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (core, case, batch, direction, dtype, sender)
    process = context.Process(target=_peak_in_this_process, args=arguments)
    process.start()
    process.join()
    return receiver.recv() if receiver.poll() else None


def _gpu_peak_mb(core: str, case: str, batch: int, direction: str, dtype: torch.dtype) -> float:
    run = make_pass(core, case, make_inputs(case, batch, "cuda"), direction, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ---- rows ----


def _times_ms(
    case: str, direction: str, batch: int, dtype: torch.dtype, rounds: int, device: str
) -> dict[str, float]:
    """Medians of "ours", of "reference" and, for a module, of "linears"; on a GPU of "launch"."""
    inputs = make_inputs(case, batch, device)
    types = {"ours": dtype, "reference": torch.float32}
    if "module" in case:
        types["linears"] = dtype
    passes = {name: make_pass(name, case, inputs, direction, t) for name, t in types.items()}
    if device == "cpu":
        measure = thread_seconds if torch.get_num_threads() == 1 else seconds
        times = medians(passes, rounds, measure)
    else:
        if dtype != torch.float32:
            passes["half"] = make_pass("reference", case, inputs, direction, dtype)
        times = medians(passes, rounds, gpu_seconds)
        times["reference"] = min(times["reference"], times.pop("half", float("inf")))
        times["launch"] = medians({"ours": passes["ours"]}, rounds, launch_seconds)["ours"]
    return {name: 1e3 * value for name, value in times.items()}


def measure(
    case: str, direction: str, batch: int, threads: int | None, dtype: torch.dtype, rounds: int,
    *, device: str, memory: bool,
) -> Row:  # fmt: skip
    """One row of the table but its targets."""
    if threads is not None:
        torch.set_num_threads(threads)
    times = _times_ms(case, direction, batch, dtype, rounds, device)
    linears = times.get("linears")
    row: Row = {
        "device": device,
        "case": case,
        "pass": direction,
        "batch": batch,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ms": times["ours"],
        "reference_ms": times["reference"],
        "ratio": times["reference"] / times["ours"],
        "linears_ms": linears,
        "over_linears": times["ours"] / linears if linears else None,
        "launch_ms": times.get("launch"),
        "ours_peak_mb": None,
        "reference_peak_mb": None,
        "max_error": None,
    }
    if memory:
        row["ours_peak_mb"] = peak_mb("ours", case, batch, direction, dtype, device)
        row["reference_peak_mb"] = peak_mb(
            "reference", case, batch, direction, torch.float32, device
        )
    if "module" not in case:
        row["max_error"] = largest_error(case, batch, direction, dtype, device)
    return row


def judge(row: Row, kernels: str, earlier: list[Row]) -> None:
    """Adds what follows from the other numbers: speed over one thread, targets, floors."""
    same = ("case", "pass", "batch", "dtype")
    alone = [x for x in earlier if x["threads"] == 1 and all(x[k] == row[k] for k in same)]
    several = row["threads"] is not None and row["threads"] > 1
    row["over_one_thread"] = alone[0]["ours_ms"] / row["ours_ms"] if alone and several else None
    row.update(target(row, kernels))
    row["peak_must_mb"] = peak_must_mb(row) if kernels != "cuda" else None
    floor = floor_ms(row) if kernels == "cuda" else None
    row["over_floor"] = row["ours_ms"] / floor if floor else None


# ---- the table ----

COLUMNS = {  # field: heading, width, format
    "case": ("case", 14, ""),
    "pass": ("pass", 16, ""),
    "batch": ("batch", 5, "d"),
    "threads": ("threads", 7, "d"),
    "dtype": ("dtype", 8, ""),
    "ours_ms": ("ours ms", 8, ".3f"),
    "reference_ms": ("reference ms", 12, ".2f"),
    "ratio": ("ratio", 6, ".1f"),
    "over_linears": ("/linears", 8, ".2f"),
    "over_one_thread": ("/1 thread", 9, ".2f"),
    "must": ("must", 5, "g"),
    "aim": ("aim", 5, "g"),
    "reached": ("reached", 7, ""),
    "launch_ms": ("launch ms", 9, ".3f"),
    "over_floor": ("/floor", 6, ".2f"),
    "ours_peak_mb": ("ours MB", 7, ".0f"),
    "peak_must_mb": ("must", 4, "d"),
    "reference_peak_mb": ("reference MB", 12, ".0f"),
    "max_error": ("error", 7, ".1e"),
}
ONLY_CPU = ("threads", "over_one_thread", "peak_must_mb")
ONLY_CUDA = ("launch_ms", "over_floor")


def _print_line(texts: dict[str, str], device: str) -> None:
    columns = {k: v for k, v in COLUMNS.items() if k not in (ONLY_CPU, ONLY_CUDA)[device == "cpu"]}
    cells = (
        texts[name].rjust(width) if kind else texts[name].ljust(width)
        for name, (_, width, kind) in columns.items()
    )
    print("  ".join(cells), flush=True)


def _print_row(row: Row) -> None:
    texts = {
        name: "-" if row[name] is None else format(row[name], kind)
        for name, (_, _, kind) in COLUMNS.items()
    }
    _print_line(texts, row["device"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of the CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", help="default: float32, bfloat16, on a GPU float16")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--kernels", default="", help="portable, avx2 or avx512; default: the best")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as models do, for both")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    args = parser.parse_args()
    if (problem := missing_kernels(args.device)) is not None:
        parser.exit(1, f"There is nothing to measure: {problem}.\n")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "There is nothing to measure: PyTorch finds no NVIDIA GPU.\n")
    return args


def main() -> None:
    args = _arguments()
    if args.keep_freed_memory and not keep_freed_memory():
        sys.exit("Freed memory is not kept: DN_DETR_MALLOC is 0, or this is not glibc.")
    device, kernels = args.device, "cuda"
    if device == "cpu":
        torch.ops.dn_detr_C.use_cpu_kernels(args.kernels)
        kernels = torch.ops.dn_detr_C.cpu_kernels()
    print(machine(kernels), flush=True)
    rows: list[Row] = []
    _print_line({name: heading for name, (heading, _, _) in COLUMNS.items()}, device)
    all_threads = args.threads if device == "cpu" else [None]
    for threads, batch, case in product(all_threads, args.batches, args.cases):
        dtypes = ["float32"] if "module" in case else args.dtypes or DTYPES[device]
        for dtype, direction in product(dtypes, DIRECTIONS[device]):
            if "module" in case and direction == BACKWARD:
                continue
            row = measure(
                case, direction, batch, threads, getattr(torch, dtype), args.rounds,
                device=device, memory=not args.no_memory,
            )  # fmt: skip
            judge(row, kernels, rows)
            rows.append(row)
            _print_row(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
