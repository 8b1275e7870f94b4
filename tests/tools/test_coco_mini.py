"""The project's main command on real COCO images: train, kill, resume, evaluate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _command(data: Path, output: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools/train_net.py")),
        *("--config-file", str(ROOT / "configs/dn_deformable_detr_r50_50ep.py")),
        f"dataloader.root={data}",
        f"train.output_dir={output}",
        "train.device=cpu",
        "train.max_iter=10",
        "train.checkpoint.period=2",
        "train.log_period=1",
        "dataloader.train.total_batch_size=2",
        "dataloader.image_scale=0.4",
        "dataloader.test.limit=16",
        *arguments,
    ]


def _numbers(output: Path) -> dict[str, float]:
    return json.loads((output / "eval/metrics.json").read_text())


@pytest.mark.slow
def test_main_command_trains_survives_a_kill_and_evaluates(shared, tmp_path):
    data, output = shared / "data/coco_mini", tmp_path / "run"
    environment = {**os.environ, "TORCH_HOME": str(tmp_path)}
    first = subprocess.Popen(
        _command(data, output), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.time() + 300
    while not (output / "checkpoints/last").exists():
        assert first.poll() is None and time.time() < deadline, first.communicate()[0]
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    subprocess.run(_command(data, output, "--resume"), env=environment, check=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, 11))
    inside = _numbers(output)
    alone = tmp_path / "alone"
    subprocess.run(
        _command(data, alone, "--eval-only", f"train.init_checkpoint={output}"),
        env=environment,
        check=True,
    )
    assert _numbers(alone) == inside
