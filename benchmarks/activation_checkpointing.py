"""What activation checkpointing saves: peak memory of a training step on a CPU.

    python benchmarks/activation_checkpointing.py --json activation_checkpointing_cpu.json

One image of 640 x 640 with 8 objects, random weights, forward and backward; each model and choice
of parts in a process of its own. `peak_mb` is what a step takes at its peak beyond model and
gradients (MiB), the median of several steps.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from timing import machine, memory_mb

MODELS = ("dn_deformable_detr_r50_50ep", "dn_detr_r50_dc5_50ep", "dn_detr_swin_t_50ep")
PARTS = ("backbone", "encoder", "decoder")
CHOICES = {"nothing": (), **{part: (part,) for part in PARTS}, "all three": PARTS}
SIDE, BOXES, CLASSES = 640, 8, 80


def measure(model: str, choice: str, rounds: int) -> dict[str, Any]:
    """One row, measured in this process; call it in a fresh one."""
    from dn_detr.config import get_config, instantiate

    torch.set_num_threads(1)  # more of them take memory of their own
    torch.manual_seed(0)
    node = get_config(f"{model}.py").model
    node.backbone.weights = None
    detector = instantiate(node).train()
    detector.checkpoint_activations(**dict.fromkeys(CHOICES[choice], True))
    images, mask = torch.randn(1, 3, SIDE, SIDE), torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    boxes = torch.cat([0.3 + 0.4 * torch.rand(BOXES, 2), 0.1 + 0.3 * torch.rand(BOXES, 2)], dim=1)
    targets = [{"labels": torch.randint(CLASSES, (BOXES,)), "boxes": boxes}]

    def step() -> None:
        torch.stack(list(detector.losses(images, mask, targets).values())).sum().backward()

    step()  # makes the gradients, which stay
    peaks = []
    for _ in range(rounds):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again without counting
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = memory_mb("VmRSS")
        step()
        peaks.append(memory_mb("VmHWM") - before)
    return {"model": model, "choice": choice, "peak_mb": round(statistics.median(peaks))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(machine("CPU operators"), file=sys.stderr)
    rows = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for model in args.models:
            for choice in CHOICES:
                rows.append(pool.apply(measure, (model, choice, args.rounds)))
                print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
