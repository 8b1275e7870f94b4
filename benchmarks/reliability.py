"""What an uninterrupted run pays for being able to survive an interrupted one, on a CPU.

    python benchmarks/reliability.py --json reliability_cpu.json

Two copies of DN-Deformable-DETR-R50 take turns on the same batches of two 320 x 426 images: one in
`dn_detr.engine.train` with all its guards, log records and checkpoints, one in a bare loop of
ten lines (forward, backward, clipping, AdamW). They alternate step by step in one process, so a
machine that slows down slows both.

`step_ratio` is the median of our step over the bare step before it, steps that save left out.
`run_ratio` is the sum over all steps of a whole checkpoint period, in which the time that the
background thread still writes after the step counts as ours and nothing of it overlaps: more than
a real run pays. `save_seconds` is how much longer a step with a save takes, `write_seconds` how
long the thread goes on. A period of `--period` steps is far shorter than the epoch of the recipe;
`epoch_ratio` is what these numbers give for 7393 steps (COCO, batches of 16) between checkpoints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch import nn

from dn_detr.checkpoint import CheckpointWriter
from dn_detr.config import LazyCall as L
from dn_detr.config import get_config, instantiate
from dn_detr.engine import build, train
from dn_detr.ops import missing_kernels
from dn_detr.structures import Boxes, Instances

CASES = {
    "defaults": [],
    "everything": [
        "train.ema.enabled=true", "train.nonfinite=skip", "train.oom=skip",
    ],
}  # fmt: skip
HEIGHT, WIDTH, IMAGES, BOXES, CLASSES = 320, 426, 2, 8, 80
STEPS_PER_EPOCH = 118287 // 16


class SyntheticImages:
    """As much of a data set as training asks for."""

    class_names = tuple(f"class{i}" for i in range(CLASSES))
    category_ids = tuple(range(CLASSES))
    annotation_file = Path("synthetic.json")
    num_boxes = 1000 * BOXES

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def batch(self, number: int) -> list[dict[str, Any]]:
        return [self.sample(number * IMAGES + i) for i in range(IMAGES)]

    def sample(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
        corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([WIDTH / 2, HEIGHT / 2])
        size = 16 + torch.rand(BOXES, 2, generator=generator) * 100
        truth = Instances(
            (HEIGHT, WIDTH),
            gt_boxes=Boxes(torch.cat([corner, corner + size], 1)),
            gt_classes=torch.randint(CLASSES, (BOXES,), generator=generator),
            gt_ids=torch.arange(BOXES) + index % 1000 * BOXES,
        )
        sample = {"image": image, "height": HEIGHT, "width": WIDTH, "image_id": index}
        return sample | {"seed": index, "instances": truth}


class NoResults:
    """An evaluator of nothing: the evaluation at the end of a run is not measured."""

    def reset(self, dataset: Any) -> None: ...

    def evaluate(self) -> dict[str, float]:
        return {"AP": 0.0}


class NoTestImages:
    """A test loader without a batch."""

    batch_size = 1

    def __init__(self) -> None:
        self.dataset = SyntheticImages(0)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class BareLoop:
    """The loop without any guard."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        backbone = [p for n, p in model.named_parameters() if p.requires_grad and "backbone" in n]
        others = [p for n, p in model.named_parameters() if p.requires_grad and "backbone" not in n]
        groups = [{"params": others}, {"params": backbone, "lr": 1e-5}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)

    def step(self, batch: list[dict[str, Any]]) -> None:
        loss = sum(self.model(batch).values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        loss.item()


class TakingTurns:
    """A loader that, between two steps of the trainer, lets the bare loop make the same step."""

    seconds: list[tuple[float, float, float]]  # ours, still writing, bare

    def __init__(self, model: Any) -> None:
        self.dataset = SyntheticImages(1000)
        self.batch_sampler = self
        self.iterations_per_epoch, self.total_batch_size = 1000, IMAGES
        self._bare = BareLoop(instantiate(model))
        TakingTurns.seconds = []

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        number = 0
        while True:
            batch = self.dataset.batch(number)
            start = time.perf_counter()
            yield batch
            stepped = time.perf_counter()
            WaitedFor.latest.wait()
            written = time.perf_counter()
            self._bare.step(batch)
            done = time.perf_counter()
            TakingTurns.seconds.append((stepped - start, written - stepped, done - written))
            number += 1


class WaitedFor(CheckpointWriter):
    """The run's own writer, for the loader to wait for."""

    latest: WaitedFor

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        WaitedFor.latest = self


def measure(overrides: list[str], steps: int, period: int) -> list[tuple[float, float, float]]:
    """Return, per step, seconds of ours, of writing after it, and of the bare loop."""
    from dn_detr.config import LazyConfig

    build.CheckpointWriter = WaitedFor  # type: ignore[attr-defined, misc]
    cfg = get_config("dn_deformable_detr_r50_50ep.py")
    cfg.model.backbone.weights = None
    cfg.dataloader.train = L(TakingTurns)(model=cfg.model)
    cfg.dataloader.test = L(NoTestImages)()
    cfg.dataloader.evaluator = L(NoResults)()
    with tempfile.TemporaryDirectory() as folder:
        train(
            LazyConfig.apply_overrides(
                cfg,
                [
                    f"train.output_dir={folder}", "train.device=cpu", "train.eval_period=0",
                    f"train.max_iter={steps + 1}", f"train.checkpoint.period={period}", *overrides,
                ],
            )
        )  # fmt: skip
    return TakingTurns.seconds


def summary(case: str, rows: list[tuple[float, float, float]], period: int) -> dict[str, Any]:
    """Condense the steps of a case; the first period warms up."""
    numbered = [(number + 1, *row) for number, row in enumerate(rows)][period:]
    plain = [(ours, bare) for number, ours, _, bare in numbered if number % period]
    saving = [
        (ours, writing, bare) for number, ours, writing, bare in numbered if not number % period
    ]
    bare = statistics.median(bare for _, bare in plain)
    save = statistics.median(ours for ours, _, _ in saving) - statistics.median(o for o, _ in plain)
    write = statistics.median(writing for _, writing, _ in saving)
    step_ratio = statistics.median(ours / bare for ours, bare in plain)
    total = sum(ours + writing for _, ours, writing, _ in numbered)
    return {
        "case": case,
        "steps": len(numbered),
        "bare_step_seconds": bare,
        "step_ratio": step_ratio,
        "save_seconds": save,
        "write_seconds": write,
        "run_ratio": total / sum(bare for *_, bare in numbered),
        "epoch_ratio": step_ratio + (save + write) / (bare * STEPS_PER_EPOCH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--periods", type=int, default=4, help="counted checkpoint periods")
    parser.add_argument("--period", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(missing_kernels("cpu") or "compiled operators"))
    results = []
    for case in arguments.cases:
        torch.manual_seed(0)
        steps = arguments.period * (arguments.periods + 1)
        rows = measure(CASES[case], steps, arguments.period)
        results.append(summary(case, rows, arguments.period))
        print(json.dumps(results[-1]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    import reliability  # a config names its classes by their module, which __main__ is not

    reliability.main()
