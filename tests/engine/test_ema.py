"""The averaged weights: right, saved, evaluated, continued and used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dn_detr.checkpoint import read_manifest, read_weights
from dn_detr.config import LazyCall
from dn_detr.engine import evaluate, launch, train

from .evaluators import FolderEvaluator
from .reference import assert_weights, rows, train_by_hand, untimed
from .small import small_run
from .test_training import assert_equal_weights

EMA = ["train.ema.enabled=true", "train.ema.decay=0.8"]


@pytest.fixture
def run(tiny_config, tmp_path):
    """Train the tiny config with averaging; returns the metrics."""

    def start(name: str, *overrides: str, resume: bool = False) -> dict:
        return train(
            tiny_config(f"train.output_dir={tmp_path}/{name}", *EMA, *overrides), resume=resume
        )

    return start


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def averages_of(folder: Path) -> Path:
    return folder / "checkpoints/last/ema.safetensors"


def test_the_average_is_the_one_computed_by_hand(tiny_config, tmp_path):
    """w0 counts as the first average; each step moves it by a fifth of the way."""
    overrides = [*EMA, "model.dropout=0", "lr_schedule.milestones=[]", "train.max_iter=3"]
    cfg = tiny_config(f"train.output_dir={tmp_path}", *overrides)
    train(cfg)
    weights, averages = train_by_hand(cfg, [1, 2, 3])
    assert_weights(tmp_path / "checkpoints/last", weights)
    assert_weights(averages_of(tmp_path), averages, rounding=1e-6)
    with pytest.raises(AssertionError):
        assert_weights(averages_of(tmp_path), weights, rounding=1e-6)


def test_averages_are_evaluated_beside_the_weights_and_in_a_folder_of_their_own(
    run, tiny_config, tmp_path
):
    cfg = tiny_config(*EMA, "train.max_iter=2", f"train.output_dir={tmp_path}/run")
    cfg.dataloader.evaluator = LazyCall(FolderEvaluator)(output_dir=f"{tmp_path}/run/eval")
    metrics = train(cfg)
    row = rows(tmp_path / "run")[-1]
    assert row["eval/AP"] == metrics["AP"] and row["eval/ema/AP"] == metrics["ema"]["AP"]
    assert metrics["AP"] != metrics["ema"]["AP"]
    assert (tmp_path / "run/eval/images.txt").read_text() == "5"
    assert (tmp_path / "run/eval/ema/images.txt").read_text() == "5"


def test_evaluating_and_fine_tuning_from_the_averages_use_them(run, tiny_config, tmp_path):
    metrics = run("a", "train.max_iter=3")
    start = f"train.init_checkpoint={averages_of(tmp_path / 'a')}"
    found = evaluate(tiny_config(start, f"train.output_dir={tmp_path}/b"))
    assert found == metrics["ema"]
    standing = ["optimizer.lr=1e-20", "optimizer.weight_decay=0.0"]
    run("c", start, "train.max_iter=1", *standing)
    assert_equal_weights(tmp_path / "c", averages_of(tmp_path / "a"))


@pytest.mark.parametrize("first", [pytest.param("applied", marks=pytest.mark.slow), "overflowing"])
def test_a_resumed_average_is_that_of_an_uninterrupted_run(first, tmp_path):
    """Also where no step had changed a weight before: float16 begins with overflows."""
    overflowing = ["train.amp.enabled=true", "train.amp.dtype=float16"]
    common = ["train.ema.enabled=true", "train.checkpoint.period=1", "train.max_iter=2"]
    common += overflowing if first == "overflowing" else []
    train(small_run(tmp_path / "whole", *common))
    train(small_run(tmp_path / "parts", *common, "train.max_iter=1"))
    train(small_run(tmp_path / "parts", *common), resume=True)
    assert rows(tmp_path / "whole")[0]["overflow_steps"] == (first == "overflowing")
    assert_equal_weights(averages_of(tmp_path / "whole"), averages_of(tmp_path / "parts"))
    last = [untimed(rows(tmp_path / name)[-1]) for name in ("whole", "parts")]
    assert last[0] == last[1] and "eval/ema/AP" in last[0]


def test_averaging_may_begin_in_a_resumed_run_and_says_so(run, tmp_path):
    run("a", "train.max_iter=2", "train.ema.enabled=false")
    before = read_weights(tmp_path / "a")
    run("a", "train.max_iter=3", resume=True)
    assert "the checkpoint holds no ema: it starts from the model's" in log_of(tmp_path / "a")
    after, found = read_weights(tmp_path / "a"), read_weights(averages_of(tmp_path / "a"))
    for name, value in before.items():
        torch.testing.assert_close(found[name], 0.8 * value + 0.2 * after[name])


def test_the_best_checkpoint_may_be_that_of_the_averages(run, tmp_path):
    run("a", "train.checkpoint.best=ema/AP", "train.checkpoint.keep=null")
    folder = tmp_path / "a/checkpoints"
    results = {
        path.name: read_manifest(path).metrics["ema"]["AP"] for path in folder.glob("0*")
    }  # fmt: skip
    assert len(results) == 3
    assert results[(folder / "best").resolve().name] == max(results.values())


def run_on_two_processes(folder: str) -> None:
    train(small_run(Path(folder, "run"), *EMA, "train.max_iter=3"))


@pytest.mark.slow
def test_two_processes_have_the_same_averages(tmp_path):
    """Each evaluates its images with its own; the sum is that of the main process's."""
    launch(run_on_two_processes, 2, str(tmp_path), device="cpu")
    found = rows(tmp_path / "run")[-1]["eval/ema/AP"]
    start = f"train.init_checkpoint={averages_of(tmp_path / 'run')}"
    alone = evaluate(small_run(tmp_path / "alone", start))
    assert alone["AP"] == pytest.approx(found, rel=1e-7)
