"""The example of a train loop of one's own trains, saves and evaluates."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dn_detr.checkpoint import read_manifest
from dn_detr.engine import evaluate

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_training_loop.py"


def test_a_train_loop_of_your_own_trains_saves_and_evaluates(tiny_config, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("own_training_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = example.main(tiny_config("train.epochs=4", "model.dropout=0", "train.log_period=1"))
    losses = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line
    ]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert read_manifest(tmp_path / "run/checkpoints/last").iteration == 12
    found = evaluate(tiny_config("model.dropout=0"))
    assert found["AP"] == pytest.approx(results["AP"])
