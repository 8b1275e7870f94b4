"""The project's main command on real COCO images: train, kill, resume, evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.runs import run_tool, wait_until

ROOT = Path(__file__).resolve().parents[2]


def _command(data: Path, output: Path, *arguments: str) -> list[str]:
    return [
        *("--config-file", str(ROOT / "configs/dn_deformable_detr_r50_50ep.py")),
        f"dataloader.root={data}",
        f"train.output_dir={output}",
        "train.device=cpu",
        "train.max_iter=4",
        "model.transformer.encoder.num_layers=1",
        "model.transformer.decoder.num_layers=2",
        "train.checkpoint.period=2",
        "train.log_period=1",
        "dataloader.train.total_batch_size=2",
        "dataloader.image_scale=0.2",
        "dataloader.test.limit=4",
        *arguments,
    ]


def _numbers(output: Path) -> dict[str, float]:
    return json.loads((output / "eval/metrics.json").read_text())


@pytest.mark.slow
def test_main_command_trains_survives_a_kill_and_evaluates(shared, tmp_path):
    data, output = shared / "data/coco_mini", tmp_path / "run"
    no_weights = {"TORCH_HOME": str(tmp_path)}
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        first = subprocess.Popen(
            [sys.executable, str(ROOT / "tools/train_net.py"), *_command(data, output)],
            env={**os.environ, **no_weights},
            stdout=file,
            stderr=file,
        )
    last = output / "checkpoints/last"
    wait_until(lambda: last.exists() or first.poll() is not None, log.read_text)
    assert first.poll() is None, log.read_text()
    first.send_signal(signal.SIGKILL)
    first.wait()
    resumed = run_tool("train_net", *_command(data, output, "--resume"), **no_weights)
    assert resumed.returncode == 0, resumed.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, 5))
    inside = _numbers(output)
    alone = tmp_path / "alone"
    arguments = _command(data, alone, "--eval-only", f"train.init_checkpoint={output}")
    evaluated = run_tool("train_net", *arguments, **no_weights)
    assert evaluated.returncode == 0, evaluated.stderr
    assert _numbers(alone) == inside
