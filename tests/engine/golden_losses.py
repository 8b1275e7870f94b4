"""The first 20 losses of a small real training, recorded on an AMD and on an Intel processor.

After a change that is meant to change them, or with another PyTorch, renew the golden ones:

    python -m tests.engine.golden_losses --write losses              # on AMD
    python -m tests.engine.golden_losses --write losses_on_intel     # on Intel
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dn_detr.config import LazyCall, LazyConfig, get_config
from dn_detr.engine import train

from .dummy import TinyEvaluator
from .reference import rows
from .small import DrawnScenes, small_detector

GOLDEN_FILE = Path(__file__).with_suffix(".json")
STEPS = 20
# Whatever picks its instructions by the processor takes those that every processor has.
PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "DN_DETR_KERNELS": "pytorch",
}


def config(output_dir: str, *overrides: str) -> Any:
    """The digits' recipe (cosine with warm-up, trainable normalisation), its model made smaller."""
    cfg = get_config("digits_dn_deformable_detr.py")
    cfg.model = small_detector()
    cfg.model.backbone.update(batch_norm="trainable", frozen_stages=0)
    cfg.dataloader.train.dataset = LazyCall(DrawnScenes)(length=16)
    cfg.dataloader.evaluator = LazyCall(TinyEvaluator)()
    cfg.dataloader.test.dataset = LazyCall(DrawnScenes)(length=2)
    return LazyConfig.apply_overrides(
        cfg,
        [
            "dataloader.train.total_batch_size=4", "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0", "train.device=cpu", "train.log_period=1",
            "train.checkpoint.period=0", "train.eval_period=0", "train.checkpoint.best=null",
            f"train.max_iter={STEPS}", f"train.output_dir={output_dir}", *overrides,
        ],
    )  # fmt: skip


def losses_here(*overrides: str) -> list[str]:
    """Train in this process; each loss as the hexadecimal digits of all its bits."""
    torch.use_deterministic_algorithms(True)
    torch.backends.mkldnn.enabled = False
    with tempfile.TemporaryDirectory() as folder:
        train(config(folder, *overrides))
        return [float(row["loss"]).hex() for row in rows(Path(folder)) if "loss" in row]


def losses_in_a_pinned_process(*overrides: str, **environment: str) -> list[str]:
    """Train in a process of its own whose arithmetic does not depend on the machine."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.engine.golden_losses", *overrides],
        env={**os.environ, **PINNED, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the losses of this process, or write those of a pinned one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="KEY", help=f"write this entry of {GOLDEN_FILE.name}")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if not arguments.write:
        print(json.dumps(losses_here(*arguments.overrides)))
        return
    content = json.loads(GOLDEN_FILE.read_text())
    content |= {"torch": torch.__version__, arguments.write: losses_in_a_pinned_process()}
    GOLDEN_FILE.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
