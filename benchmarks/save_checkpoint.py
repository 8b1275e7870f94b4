"""How long saving a checkpoint holds a training up, and what writing it takes from the main thread.

    python benchmarks/save_checkpoint.py --json save_checkpoint.json

A state of 50 million float32 numbers in 500 tensors is saved, alone and with what a training has
beside it (AdamW's two moments and the EMA: four times as many numbers). Columns: how long the first
`save` and later ones block; how long until all is on the disk; steps per second of the main thread
while the thread writes, over those when it does not, for pure Python (which needs the interpreter's
lock all the time) and for a matrix product of torch on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dn_detr.checkpoint import CheckpointWriter, Snapshot

TENSORS = 500
REPEATS = 5


def state(numbers: int, *, with_training: bool) -> Snapshot:
    """Weights, and if wished the moments of AdamW and the EMA."""
    weights = {f"layer{i}.weight": torch.rand(numbers // TENSORS) for i in range(TENSORS)}
    if not with_training:
        return Snapshot(1, 0.0, weights)
    moments = {
        i: {"exp_avg": torch.rand_like(value), "exp_avg_sq": torch.rand_like(value)}
        for i, value in enumerate(weights.values())
    }
    ema = {name: value.clone() for name, value in weights.items()}
    return Snapshot(1, 0.0, weights, {"state": moments, "param_groups": []}, ema=ema)


def count_in_python() -> None:
    """A step that never lets go of the interpreter's lock by itself."""
    for _ in range(10_000):
        pass


def multiply() -> None:
    """A step that computes outside of the interpreter."""
    torch.mm(_MATRIX, _MATRIX)


_MATRIX = torch.rand(128, 128)


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_saving(snapshot: Snapshot, *, asynchronous: bool) -> dict[str, float]:
    """Block and write times, each save into the place of the one before."""
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointWriter(folder, keep=1, asynchronous=asynchronous) as writer,
    ):
        blocked, written = [], []
        for _ in range(1 + REPEATS):
            blocked.append(seconds(lambda: writer.save(snapshot)))
            written.append(blocked[-1] + seconds(writer.wait))
    return {
        "first_block_s": blocked[0],
        "block_s": statistics.median(blocked[1:]),
        "written_s": statistics.median(written[1:]),
    }


def measure_disturbance(snapshot: Snapshot, step: Callable[[], None]) -> float:
    """Steps per second while a checkpoint is written, over those while none is."""
    alone, beside = [], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder, CheckpointWriter(folder) as writer:
            alone.append(_rate(step, lambda: False))
            writer.save(snapshot)
            beside.append(_rate(step, lambda writer=writer: writer.latest is not None))
    return statistics.median(beside) / statistics.median(alone)


def _rate(step: Callable[[], None], is_over: Callable[[], bool]) -> float:
    started, steps = time.perf_counter(), 0
    while time.perf_counter() < started + 1.0 and not is_over():
        step()
        steps += 1
    return steps / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file")
    parser.add_argument("--numbers", type=int, default=50_000_000, help="of the model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for with_training in (False, True):
        snapshot = state(arguments.numbers, with_training=with_training)
        disturbance = {
            "python_rate": measure_disturbance(snapshot, count_in_python),
            "torch_rate": measure_disturbance(snapshot, multiply),
        }
        for asynchronous in (True, False):
            rows.append(
                {
                    "numbers": arguments.numbers * (4 if with_training else 1),
                    "asynchronous": asynchronous,
                    **measure_saving(snapshot, asynchronous=asynchronous),
                    **(disturbance if asynchronous else {}),
                }
            )
            print("  ".join(f"{k} {v:.3g}" for k, v in rows[-1].items()), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
