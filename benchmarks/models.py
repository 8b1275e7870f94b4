"""Speed and memory of whole models on a CPU, against Hugging Face transformers.

    python benchmarks/models.py --json models_cpu.json

Cases: DN-Deformable-DETR-R50 against DeformableDetr (with_box_refine, plain PyTorch operators, as
wide feed-forward layers as ours), DN-DETR-R50 against DabDetr; both with random weights, 300
queries and 80 classes, on the same numbers. Theirs have no denoising queries to carry. Passes:

    evaluation   forward of one 800 x 1066 image
    training     two 480 x 640 images of 8 boxes each: forward, losses of all layers, backward,
                 clipping of the gradient, AdamW

Every contestant lives in a process of its own, and they run in turns. Memory is the peak of
resident memory beyond what the process held before it built the model. Arithmetic time is that of
our pass's floating-point operations (convolutions, matrix products) at the machine's own rate,
measured in the same run with torch's convolutions and products of the models' shapes in the same
type. `ratio_to_float32` compares with theirs in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import machine, medians, memory_mb, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CASES = ("dn_deformable_detr_r50", "dn_detr_r50")
PASSES = {"evaluation": (1, 800, 1066), "training": (2, 480, 640)}  # images, height, width
BOXES, CLASSES = 8, 80

Run = Callable[[], Any]


# ---- contestants ----


def _images(kind: str) -> Tensor:
    images, height, width = PASSES[kind]
    return torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0))


def _targets(kind: str) -> list[dict[str, Tensor]]:
    """Classes and boxes (cx, cy, w, h) in [0, 1] of each image."""
    generator = torch.Generator().manual_seed(1)
    targets = []
    for _ in range(PASSES[kind][0]):
        centre = 0.3 + 0.4 * torch.rand(BOXES, 2, generator=generator)
        size = 0.05 + 0.5 * torch.rand(BOXES, 2, generator=generator)
        labels = torch.randint(CLASSES, (BOXES,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat([centre, size], dim=1)})
    return targets


def _ours(case: str, kind: str) -> tuple[nn.Module, Run]:
    from dn_detr.config import get_config, instantiate

    model = instantiate(get_config(f"models/{case}.py").model).train(kind == "training")
    images, targets = _images(kind), _targets(kind)
    mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    if kind == "evaluation":
        return model, lambda: model.forward_tensors(images, mask)
    return model, lambda: sum(model.losses(images, mask, targets).values())


def _reference(case: str, kind: str) -> tuple[nn.Module, Run]:
    import transformers

    same = {"num_labels": CLASSES, "num_queries": 300, "dropout": 0.0, "auxiliary_loss": True}
    if case == "dn_deformable_detr_r50":
        width = {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
        config = transformers.DeformableDetrConfig(with_box_refine=True, **width, **same)
        model = transformers.DeformableDetrForObjectDetection(config)
    else:
        config = transformers.DabDetrConfig(**same)
        model = transformers.DabDetrForObjectDetection(config)
    model.train(kind == "training")
    images = _images(kind)
    mask = torch.ones(len(images), *images.shape[-2:], dtype=torch.long)
    if kind == "evaluation":
        return model, lambda: model(images, mask)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in _targets(kind)]
    return model, lambda: model(images, mask, labels=labels).loss


CONTESTANTS = {"ours": _ours, "reference": _reference}


def _evaluation(forward: Run, dtype: torch.dtype) -> Run:
    def run() -> None:
        with torch.no_grad(), _autocast(dtype):
            forward()

    return run


def _training_step(model: nn.Module, forward: Run, dtype: torch.dtype) -> Run:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4)

    def run() -> None:
        with _autocast(dtype):
            loss = forward()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    return run


def _autocast(dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def _work(
    contestant: str, case: str, kind: str, dtype: torch.dtype, threads: int, pipe: Any
) -> None:
    """Answer each order of the parent: "run" in seconds, "count" in FLOP, "peak" in MiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if contestant == "ours":
        import dn_detr.modeling  # noqa: F401, memory of the modules themselves does not count
        from dn_detr.allocator import keep_freed_memory

        keep_freed_memory()
    else:
        import transformers  # noqa: F401
    before = memory_mb("VmRSS")
    model, forward = CONTESTANTS[contestant](case, kind)
    training = kind == "training"
    run = _training_step(model, forward, dtype) if training else _evaluation(forward, dtype)
    while (order := pipe.recv()) != "end":
        if order == "run":
            pipe.send(seconds(run))
        elif order == "peak":
            pipe.send(memory_mb("VmHWM") - before)
        else:
            if not training:
                model.requires_grad_(False)  # the counter wants it so where no graph is built
            with FlopCounterMode(display=False) as counter:
                run()
            pipe.send(counter.get_total_flops())


class Contestant:
    """A model that runs in a process of its own, on request."""

    def __init__(self, name: str, *args: Any) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, *args, theirs))
        self._process.start()
        theirs.close()

    def ask(self, order: str) -> float:
        self._pipe.send(order)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send("end")
        self._process.join()


# ---- the machine ----

_PRODUCTS = [(17_821, 256, 2048), (17_821, 2048, 256), (17_821, 256, 256)]
_CONVOLUTIONS = [  # input channels, output channels, size of the filter, height, width
    (64, 64, 3, 200, 267),
    (256, 128, 1, 200, 267),
    (128, 128, 3, 100, 134),
    (256, 256, 3, 50, 67),
    (1024, 256, 1, 50, 67),
    (512, 512, 3, 25, 34),
    (512, 2048, 1, 25, 34),
]


def machine_rate(dtype: torch.dtype, threads: int, rounds: int = 5) -> float:
    """FLOP/s of matrix products and convolutions of the models' shapes, each counted once."""
    torch.set_num_threads(threads)
    runs: dict[str, Run] = {}
    flop = 0
    for m, k, n in _PRODUCTS:
        x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        runs[f"product {m} {k} {n}"] = lambda x=x, w=w: F.linear(x, w)
        flop += 2 * m * k * n
    for c, o, size, height, width in _CONVOLUTIONS:
        x = torch.randn(1, c, height, width, dtype=dtype)
        w = torch.randn(o, c, size, size, dtype=dtype)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        pad = size // 2
        runs[f"conv {c} {o} {size}"] = lambda x=x, w=w, pad=pad: F.conv2d(x, w, padding=pad)
        flop += 2 * c * o * size * size * height * width
    with torch.no_grad():
        return flop / sum(medians(runs, rounds).values())


# ---- the table ----


def measure(
    case: str, kind: str, dtype: torch.dtype, threads: int, rounds: int, rate: float
) -> dict[str, Any]:
    """One row: medians of the contestants in turns, their peaks, and our arithmetic."""
    contestants = {name: Contestant(name, case, kind, dtype, threads) for name in CONTESTANTS}
    runs = {name: partial(contestant.ask, "run") for name, contestant in contestants.items()}
    times = medians(runs, rounds)
    peaks = {name: contestant.ask("peak") for name, contestant in contestants.items()}
    flop = contestants["ours"].ask("count")
    for contestant in contestants.values():
        contestant.close()
    return {
        "case": case,
        "pass": kind,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "ours_s": times["ours"],
        "reference_s": times["reference"],
        "ratio": times["reference"] / times["ours"],
        "gflop": flop / 1e9,
        "gflop_per_s": rate / 1e9,
        "arithmetic_s": flop / rate,
        "over_arithmetic": times["ours"] * rate / flop,
        "ours_peak_mb": peaks["ours"],
        "reference_peak_mb": peaks["reference"],
    }


COLUMNS = {  # name: width and format
    "case": (22, ""),
    "pass": (10, ""),
    "dtype": (8, ""),
    "ours_s": (6, ".2f"),
    "reference_s": (11, ".2f"),
    "ratio": (5, ".2f"),
    "ratio_to_float32": (16, ".2f"),
    "gflop": (5, ".0f"),
    "gflop_per_s": (11, ".0f"),
    "over_arithmetic": (15, ".2f"),
    "ours_peak_mb": (12, ".0f"),
    "reference_peak_mb": (17, ".0f"),
}


def _print_line(cells: dict[str, str]) -> None:
    texts = (
        cells[name].rjust(width) if kind else cells[name].ljust(width)
        for name, (width, kind) in COLUMNS.items()
    )
    print("  ".join(texts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    where = machine(_kernels())
    print(where, file=sys.stderr)
    rows: list[dict[str, Any]] = []
    theirs_in_float32: dict[tuple[str, str], float] = {}
    _print_line({name: name for name in COLUMNS})
    for dtype in (getattr(torch, name) for name in args.dtypes):
        rate = machine_rate(dtype, args.threads)
        for case in args.cases:
            for kind in args.passes:
                row = measure(case, kind, dtype, args.threads, args.rounds, rate)
                if dtype == torch.float32:
                    theirs_in_float32[case, kind] = row["reference_s"]
                baseline = theirs_in_float32.get((case, kind), float("nan"))
                row["ratio_to_float32"] = baseline / row["ours_s"]
                rows.append(row)
                _print_line({name: format(row[name], kind) for name, (_, kind) in COLUMNS.items()})
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


def _kernels() -> str:
    """Which kernels the operators use; asked for in a process that measures no memory."""
    from dn_detr.ops.library import compiled_operators

    operators = compiled_operators(torch.device("cpu"))
    return f"{operators.cpu_kernels()} operators" if operators else "PyTorch operators"


if __name__ == "__main__":
    main()
