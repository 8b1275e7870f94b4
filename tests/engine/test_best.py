"""The best checkpoint, and runs that end when results do not get better."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dn_detr.checkpoint import read_manifest
from dn_detr.config import LazyCall
from dn_detr.engine import NonFiniteError, train
from dn_detr.engine.best import BestResult
from dn_detr.engine.evaluation import check_watched_result
from dn_detr.evaluation import CocoEvaluator

from .conftest import TINY_CONFIG
from .evaluators import ScriptedEvaluator
from .reference import images_of_batch, rows
from .runs import run_tool
from .small import small_run

EVERY = ["train.eval_period=1", "train.checkpoint.period=1"]


@pytest.fixture
def run(tiny_config, tmp_path):
    """Train the tiny config whose evaluations give these values one after the other."""

    def start(values: list[float], *overrides: str, resume: bool = False) -> dict:
        cfg = tiny_config(f"train.output_dir={tmp_path}/run", *EVERY, *overrides)
        cfg.dataloader.evaluator = script(values, tmp_path)
        return train(cfg, resume=resume)

    return start


def script(values: list[float], folder: Path):
    return LazyCall(ScriptedEvaluator)(values=values, counter=f"{folder}/count.txt")


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/checkpoints").glob("0*"))


def best_of(folder: Path) -> Path:
    return (folder / "run/checkpoints/best").resolve()


def test_the_best_checkpoint_survives_the_removal_of_old_ones(run, tmp_path):
    run([0.1, 0.5, 0.2, 0.3, 0.4], "train.max_iter=5", "train.checkpoint.keep=1")
    assert saved(tmp_path) == ["0000002", "0000005"]
    assert best_of(tmp_path).name == "0000002"
    assert read_manifest(best_of(tmp_path)).metrics["AP"] == 0.5


def test_the_best_evaluation_is_saved_where_no_checkpoint_was_due(run, tmp_path):
    run([0.1, 0.5, 0.2, 0.3], "train.max_iter=4", "train.checkpoint.period=0")
    assert best_of(tmp_path).name == "0000002" and saved(tmp_path)[-1] == "0000004"


@pytest.mark.parametrize("undefined", [-1.0, float("nan")])
def test_an_undefined_result_is_never_the_best(undefined, run, tmp_path):
    run([undefined, undefined], "train.max_iter=2")
    assert not (tmp_path / "run/checkpoints/best").exists()


def test_the_first_of_equal_results_is_the_best(run, tmp_path):
    run([0.3, 0.3], "train.max_iter=2")
    assert best_of(tmp_path).name == "0000001"


def test_an_unknown_result_is_an_error_that_lists_the_known_ones(run):
    with pytest.raises(
        ValueError, match=r"best=AP95: the evaluation has no such result; it has AP, pe"
    ):
        run([0.1], "train.checkpoint.best=AP95")


@pytest.mark.parametrize("min_delta", [0.0, 0.05])
def test_a_run_ends_after_patience_evaluations_without_a_gain(min_delta, run, tmp_path):
    values = [0.1, 0.5, 0.52, 0.51, 0.5, 0.4, 0.4, 0.4, 0.4]
    run(values, "train.early_stopping.patience=3", f"train.early_stopping.min_delta={min_delta}")
    assert rows(tmp_path / "run")[-1]["iteration"] == (6 if min_delta == 0 else 5)
    assert best_of(tmp_path).name == "0000003"  # a small gain is one, for the best checkpoint
    assert (
        f"early stopping: AP gained no more than {min_delta:g} in the last 3"
        in (tmp_path / "run/log.txt").read_text()
    )


def test_resuming_a_run_that_stagnated_trains_no_further(run, tmp_path):
    values = [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    run(values, "train.early_stopping.patience=2")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    run(values, "train.early_stopping.patience=2", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert saved(tmp_path)[-1] == "0000003"


@pytest.mark.parametrize("period", [0, 1])
@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_an_interruption_changes_nothing_about_patience(stopped_at, period, run, tmp_path):
    """A checkpoint is written before its evaluation, or after it if that was the best."""
    values = [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    patient = ["train.early_stopping.patience=3", f"train.checkpoint.period={period}"]
    with pytest.raises(NonFiniteError):
        run(values, *patient, f"model.nan_at={stopped_at + 1}")
    run(values, *patient, resume=True)
    assert rows(tmp_path / "run")[-1]["iteration"] == 4
    assert best_of(tmp_path).name == "0000001"


def test_a_rollback_evaluates_nothing_twice(tmp_path):
    cfg = small_run(
        tmp_path, f"model.bad_images={images_of_batch(4)}", "train.nonfinite=rollback", *EVERY,
        "train.early_stopping.patience=2", "train.max_iter=4",
    )  # fmt: skip
    cfg.dataloader.evaluator = script([0.1, 0.5, 0.4, 0.6], tmp_path)
    train(cfg)
    found = [(r["iteration"], r["eval/AP"]) for r in rows(tmp_path) if "eval/AP" in r]
    assert found == [(1, 0.1), (2, 0.5), (3, 0.4), (4, 0.6)]
    assert read_manifest(tmp_path / "checkpoints/0000003").metrics["AP"] == 0.4


def test_a_best_checkpoint_that_was_deleted_is_followed_by_the_next_best(run, tmp_path):
    values = [0.5, 0.1, 0.3, 0.2]
    run(values, "train.max_iter=2")
    shutil.rmtree(best_of(tmp_path))
    run(values, "train.max_iter=4", resume=True)
    assert best_of(tmp_path).name == "0000003"


def test_a_result_that_earlier_evaluations_lack_can_be_followed_from_a_resume_on(
    tiny_config, tmp_path
):
    length = [f"train.output_dir={tmp_path}/run", *EVERY]
    train(tiny_config(*length, "train.max_iter=2"))
    average = ["train.ema.enabled=true", "train.checkpoint.best=ema/AP", "train.max_iter=3"]
    train(tiny_config(*length, *average), resume=True)
    assert best_of(tmp_path).name in ("0000002", "0000003")
    assert "ema" in read_manifest(best_of(tmp_path)).metrics


def test_results_of_another_metric_are_forgotten():
    first = BestResult("AP")
    first.update({"AP": 0.9})
    second = BestResult("AP50")
    second.load_state_dict(first.state_dict())
    second.update({"AP50": 0.1})
    assert second.is_best


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_ends_with_0_when_results_stagnate(processes, tmp_path):
    """The tiny evaluator's result falls, or rises by less than ten."""
    ended = run_tool(
        "train_net", "--config-file", TINY_CONFIG, "--num-gpus", processes,
        f"train.output_dir={tmp_path}", "train.eval_period=1",
        "train.early_stopping.patience=2", "train.early_stopping.min_delta=10000",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert rows(tmp_path)[-1]["iteration"] == 3


def test_a_result_that_no_evaluation_will_have_is_refused_before_training():
    evaluators = {"": CocoEvaluator()}
    for known in ("AP", "APs", "per_class/cat", None):
        check_watched_result(known, evaluators, ["cat"])
    with pytest.raises(ValueError, match="no evaluation has such a result; they have AP, AP50"):
        check_watched_result("per_class/dog", evaluators, ["cat"])
    with pytest.raises(ValueError, match=r"needs train\.ema\.enabled=true"):
        check_watched_result("ema/AP", evaluators, ["cat"])
    check_watched_result("ema/AP", {**evaluators, "ema": CocoEvaluator()}, ["cat"])
