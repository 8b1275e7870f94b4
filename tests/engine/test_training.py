from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dn_detr.checkpoint import CheckpointError, load_checkpoint, read_manifest, read_weights
from dn_detr.config import LazyCall, LazyConfig
from dn_detr.engine import Callback, NonFiniteError, Timetable, evaluate, train
from dn_detr.engine.callbacks import Callbacks
from dn_detr.engine.settings import CheckpointSettings
from dn_detr.engine.training import config_changes, warn_of_small_disk
from dn_detr.engine.writers import MetricsFile
from dn_detr.errors import UserError

from .dummy import TinyDetector, TinyEvaluator


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(row: dict) -> dict:
    timings = {"data_time", "iter_time", "images_per_s", "memory_mib"}
    return {name: value for name, value in row.items() if name not in timings}


def assert_equal_weights(first: Path, second: Path) -> None:
    expected, found = read_weights(first), read_weights(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


@pytest.fixture
def run(tiny_config, tmp_path):
    """Train the tiny config; returns the metrics. The output folder is `tmp_path/NAME`."""

    def start(name: str, *overrides: str, resume: bool = False) -> dict:
        return train(tiny_config(f"train.output_dir={tmp_path}/{name}", *overrides), resume=resume)

    return start


def test_a_run_leaves_config_environment_log_metrics_events_and_checkpoints(run, tmp_path):
    run("a")
    folder = tmp_path / "a"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock", "checkpoints", "config.yaml", "environment.txt", "log.txt", "metrics.jsonl",
        "tensorboard",
    }  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "0000003", "0000006", "0000009", "best", "last",
    ]  # fmt: skip
    environment = (folder / "environment.txt").read_text()
    assert f"torch: {torch.__version__.split('+')[0]}" in environment
    assert "git commit: " in environment and "iteration 8/9" in (folder / "log.txt").read_text()


def test_the_log_says_what_the_run_computes_on(run, tmp_path, monkeypatch):
    run("cpu", "train.max_iter=1")
    assert "INFO running on cpu" in (tmp_path / "cpu/log.txt").read_text()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run("auto", "train.max_iter=1", "train.device=auto")
    assert "WARNING no GPU was found" in (tmp_path / "auto/log.txt").read_text()


def test_rows_come_every_log_period_and_evaluations_every_eval_period(run, tmp_path):
    metrics = run("a")
    found = rows(tmp_path / "a")
    assert [row["iteration"] for row in found if "loss" in row] == [2, 4, 6, 8, 9]
    assert [row["iteration"] for row in found if "eval/AP" in row] == [3, 6, 9]
    assert found[-1]["eval/AP"] == metrics["AP"]
    assert found[-1]["eval/per_class/class1"] == metrics["per_class"]["class1"]
    first = found[0]
    assert first["loss"] == pytest.approx(first["loss/loss_class"] + first["loss/loss_bbox"])
    assert first["epoch"] == pytest.approx(2 / 3)


def test_learning_rate_drops_after_the_milestone_epoch(run, tmp_path):
    run("a", "train.log_period=1")
    rates = [row["lr/default"] for row in rows(tmp_path / "a") if "loss" in row]
    assert rates == pytest.approx([1e-2] * 6 + [1e-3] * 3)


def test_training_lowers_the_loss(run, tmp_path):
    run("a", "train.epochs=20", "lr_schedule.milestones=[]", "train.clip_grad.max_norm=null")
    losses = [row["loss"] for row in rows(tmp_path / "a") if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_equal_seeds_give_equal_weights_and_others_do_not(run, tmp_path):
    run("a")
    run("b")
    run("c", "train.seed=1")
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "a", tmp_path / "c")


class Removing(Callback):
    """Removes metrics.jsonl and log.txt, or renames their folder, after the third step."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder

    def after_step(self, state, samples, result):
        if state.iteration == 3 and self.folder:
            state.output_dir.rename(state.output_dir.with_name("elsewhere"))
        elif state.iteration == 3:
            for name in ("metrics.jsonl", "log.txt"):
                (state.output_dir / name).unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("folder", [False, True])
def test_a_run_whose_files_are_removed_goes_on_and_ends_with_an_error(
    tiny_config, tmp_path, folder
):
    cfg = tiny_config(f"train.output_dir={tmp_path}/run", "train.checkpoint.period=3")
    cfg.train.callbacks = {"removing": LazyCall(Removing)(folder=folder)}
    with pytest.raises(ValueError, match=r"metrics\.jsonl was removed or renamed during the run"):
        train(cfg)
    assert [row["iteration"] for row in rows(tmp_path / "run") if "loss" in row] == [4, 6, 8, 9]
    assert read_manifest(tmp_path / "run/checkpoints/last").iteration == 9
    log = (tmp_path / "run/log.txt").read_text()
    assert "metrics.jsonl was removed or renamed; a new one is begun" in log
    assert folder or "log.txt was removed or renamed, this is a new one" in log


def test_log_records_are_on_the_disk_before_a_checkpoint_names_their_number(
    run, tmp_path, monkeypatch
):
    flushed: list[int] = []

    def flush_to_disk(file: MetricsFile) -> None:
        flushed.append(len(file.path.read_text().splitlines()))

    monkeypatch.setattr(MetricsFile, "flush_to_disk", flush_to_disk)
    run("a", "train.log_period=1", "train.eval_period=0", "train.max_iter=6")
    assert flushed == [3, 6, 7]  # two checkpoints, and the evaluation that one of them gets
    saved = load_checkpoint(tmp_path / "a/checkpoints/last").snapshot.training_state
    assert saved["log_records"] == 6


@pytest.mark.parametrize(("keep", "count"), [(3, 5), (None, 12)])
def test_too_little_space_for_the_checkpoints_is_told_with_figures(
    tmp_path, monkeypatch, caplog, keep, count
):
    state: Any = SimpleNamespace(
        model=nn.Linear(2**18, 64, bias=False, device="meta"),  # 64 MiB, and twice that for Adam
        callbacks=Callbacks({}),
        timetable=Timetable(10, 100),
        output_dir=tmp_path,
    )
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)
    for free in (192 * count, 192 * count - 1):
        usage = SimpleNamespace(free=free * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert caplog.messages == []
        warn_of_small_disk(state, CheckpointSettings(keep=keep))
    (message,) = caplog.messages
    figures = f"{192 * count - 1} MiB are free, and {count} checkpoints of this run take about"
    assert figures in message and f"about {192 * count} MiB: make room" in message


def test_evaluating_more_often_does_not_change_the_training(run, tmp_path):
    run("a", "train.eval_period=1")
    run("b", "train.eval_period=0")
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert [row["iteration"] for row in rows(tmp_path / "b") if "eval/AP" in row] == [9]


@pytest.mark.parametrize("amp", ["false", "true"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(run, tmp_path, amp, workers):
    overrides = (
        f"train.amp.enabled={amp}",
        "train.amp.dtype=float16",
        f"dataloader.train.num_workers={workers}",
        "train.checkpoint.period=5",  # between two rows of metrics, inside an epoch
    )
    whole = run("whole", *overrides)
    with pytest.raises(NonFiniteError):
        run("parts", *overrides, "model.nan_at=7")
    resumed = run("parts", *overrides, resume=True)
    assert resumed == whole
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    expected = [untimed(row) for row in rows(tmp_path / "whole")]
    assert [untimed(row) for row in rows(tmp_path / "parts")] == expected


def test_resuming_needs_the_saved_random_numbers(run, tmp_path, monkeypatch):
    """The negative control: without them, dropout differs and so do the weights."""
    run("whole", "train.checkpoint.period=5")
    with pytest.raises(NonFiniteError):
        run("parts", "train.checkpoint.period=5", "model.nan_at=7")
    monkeypatch.setattr("dn_detr.engine.run_state.restore_random_state", lambda state: None)
    run("parts", "train.checkpoint.period=5", resume=True)
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_returns_its_metrics_and_changes_nothing(run, tmp_path):
    metrics = run("a")
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert run("a", resume=True) == metrics
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == before


def test_resuming_after_an_interrupted_evaluation_evaluates_once(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dn_detr.engine.trainer.evaluate_model", interrupt)
        run("a", "train.eval_period=0")
    metrics = run("a", "train.eval_period=0", resume=True)
    found = rows(tmp_path / "a")
    assert [row["eval/AP"] for row in found if "eval/AP" in row] == [metrics["AP"]]
    assert read_manifest(tmp_path / "a" / "checkpoints" / "last").metrics == metrics


def test_a_resumed_run_can_be_prolonged_and_says_what_changed(run, tmp_path):
    run("a", "train.epochs=1")
    run("a", "train.epochs=2", "optimizer.lr=0.02", resume=True)
    found = [row for row in rows(tmp_path / "a") if "loss" in row]
    assert found[-1]["iteration"] == 6
    assert found[-1]["lr/default"] == pytest.approx(0.02)
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "changed since that checkpoint: optimizer.lr: 0.01 -> 0.02" in log


def test_nothing_to_resume_starts_a_new_run_and_says_so(run, tmp_path):
    run("a", "train.max_iter=1", resume=True)
    assert "nothing to resume" in (tmp_path / "a" / "log.txt").read_text()
    assert rows(tmp_path / "a")[-1]["iteration"] == 1


def test_the_rows_of_a_run_whose_checkpoints_are_gone_are_kept_aside(run, tmp_path):
    run("a", "train.max_iter=2", "train.log_period=1")
    before = (tmp_path / "a" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    run("a", "train.max_iter=1")
    assert (tmp_path / "a" / "before_metrics.jsonl").read_text() == before
    assert rows(tmp_path / "a")[-1]["iteration"] == 1
    assert "kept as" in (tmp_path / "a" / "log.txt").read_text()


def test_a_new_run_never_mixes_with_the_checkpoints_of_another(run, tmp_path):
    run("a", "train.max_iter=1")
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run with 1 iterations: add --resume"):
        run("a", "train.max_iter=1")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


def test_evaluate_gives_the_numbers_of_the_evaluation_inside_training(run, tiny_config, tmp_path):
    metrics = run("a")
    checkpoint = f"train.init_checkpoint={tmp_path}/a/checkpoints/last"
    assert evaluate(tiny_config(checkpoint, f"train.output_dir={tmp_path}/b")) == metrics
    assert evaluate(tiny_config(f"train.output_dir={tmp_path}/a")) == metrics


def test_evaluate_without_a_checkpoint_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(tiny_config())


def test_evaluate_leaves_the_files_of_the_training_alone(run, tiny_config, tmp_path):
    run("a")
    files = [tmp_path / "a" / name for name in ("config.yaml", "metrics.jsonl", "environment.txt")]
    before = [path.read_bytes() for path in files]
    evaluate(tiny_config(f"train.output_dir={tmp_path}/a", "dataloader.test.batch_size=1"))
    assert [path.read_bytes() for path in files] == before
    assert "batch_size: 1" in (tmp_path / "a" / "eval" / "config.yaml").read_text()


def test_fine_tuning_starts_from_the_weights_at_iteration_zero(run, tmp_path):
    run("a")
    run(
        "b", f"train.init_checkpoint={tmp_path}/a", "train.max_iter=1", "optimizer.lr=1e-20",
        "optimizer.weight_decay=0.0",
    )  # fmt: skip
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert read_manifest(tmp_path / "b" / "checkpoints" / "last").iteration == 1


def test_the_saved_config_repeats_the_run(run, tmp_path):
    run("a")
    cfg = LazyConfig.load(tmp_path / "a" / "config.yaml", allow=("tests",))
    train(LazyConfig.apply_overrides(cfg, [f"train.output_dir={tmp_path}/b"]))
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


def test_more_classes_in_the_data_than_in_the_model_stop_before_training(run):
    with pytest.raises(ValueError, match=r"set model.num_classes=2"):
        run("a", "model.num_classes=1")


def test_what_is_no_detector_is_an_error(tiny_config):
    cfg = tiny_config()
    cfg.model = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    with pytest.raises(ValueError, match=r"model is of type Linear; .* num_classes"):
        train(cfg)


def test_a_manifest_names_the_classes_and_holds_the_config(run, tmp_path):
    run("a")
    manifest = read_manifest(tmp_path / "a" / "checkpoints" / "last")
    assert manifest.class_names == ["class0", "class1"]
    assert manifest.config == (tmp_path / "a" / "config.yaml").read_text()
    assert manifest.epoch == 3.0


def test_another_optimizer_is_no_place_to_resume_into(run):
    run("a", "train.max_iter=1")
    with pytest.raises(ValueError, match="optimizer has the groups"):
        run("a", "train.max_iter=2", "~optimizer.params.lr_factors.backbone", resume=True)


def test_a_failing_step_logs_its_images(run, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError

    monkeypatch.setattr("tests.engine.dummy.TinyDetector._losses", fail)
    with pytest.raises(KeyError):
        run("a")
    assert "iteration 1 failed on images/" in (tmp_path / "a" / "log.txt").read_text()


def test_logging_ends_with_the_run(run):
    run("a", "train.max_iter=1")
    assert logging.getLogger("dn_detr").handlers == []


def test_config_changes_name_the_leaves_that_differ():
    before, after = "a: {b: 1, c: [1, 2]}\nd: x\n", "a: {b: 2, c: [1]}\nd: x\n"
    assert config_changes(before, after) == ["a.b: 1 -> 2", "a.c.1: 2 -> absent"]


def test_an_evaluation_alone_whose_files_are_not_written_is_an_error(
    run, tiny_config, tmp_path, monkeypatch
):
    run("a", "train.max_iter=1")
    monkeypatch.setattr(TinyEvaluator, "unwritten", [tmp_path / "x.json"], raising=False)
    with pytest.raises(UserError, match=r"x\.json: not written"):
        evaluate(tiny_config(f"train.output_dir={tmp_path}/a"))


def test_a_config_of_endless_aliases_is_not_compared():
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (only,) = config_changes(f"a0: &a0 [x]\n{levels}", "a: 1")
    assert "cannot be told" in only and "has an alias" in only


STATES = {
    "nothing": lambda state: state.clear(),
    "batches of text": lambda state: state.update(batches_drawn="x"),
    "a best without a value": lambda state: state["best"].pop("value"),
    "no rank": lambda state: state.update(ranks=[{}]),
    "random numbers of text": lambda state: state["ranks"][0]["random"].update(python="x"),
    "optimizer": lambda state: state["optimizer"].update(param_groups=[{}]),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_is_none_of_a_run_is_an_error_with_its_folder(run, tmp_path, case):
    run("a", "train.max_iter=1")
    checkpoint = load_checkpoint(tmp_path / "a/checkpoints/last")
    state = dict(checkpoint.snapshot.training_state, optimizer=checkpoint.snapshot.optimizer)
    STATES[case](state)
    snapshot = replace(
        checkpoint.snapshot, optimizer=state.pop("optimizer", {}), training_state=state
    )
    last = replace(checkpoint, snapshot=snapshot)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="its state"):
        patch.setattr("dn_detr.engine.training.load_last", lambda folder: last)
        run("a", "train.max_iter=2", resume=True)


def test_clipping_and_mixed_precision_settings_reach_the_step(run, tmp_path):
    """Each of them, and nothing else, changes the weights after one step."""
    weights = {}
    for name, override in (
        ("plain", "train.seed=42"),
        ("clip", "train.clip_grad.max_norm=1e-8"),
        ("amp", "train.amp.enabled=true"),
    ):
        run(name, "train.max_iter=1", override)
        weights[name] = read_weights(tmp_path / name)
    for name in ("clip", "amp"):
        assert any(not torch.equal(weights[name][key], w) for key, w in weights["plain"].items())


def test_evaluating_data_of_other_classes_is_refused(run, tiny_config, tmp_path):
    run("a", "train.max_iter=1")
    cfg = tiny_config(f"train.output_dir={tmp_path}/a", "+dataloader.test.dataset.num_classes=1")
    with pytest.raises(
        ValueError, match=r"other classes: the file has 2 .*class1\), the data 1 class"
    ):
        evaluate(cfg)


def test_training_checks_that_both_data_sets_have_the_same_classes(run):
    with pytest.raises(ValueError, match="different categories"):
        run("a", "+dataloader.test.dataset.num_classes=1")


def test_pretrained_parts_load_in_a_new_run_only(run, tiny_config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        TinyDetector, "load_pretrained", lambda self: bool(calls.append("called")), raising=False
    )
    run("a", "train.max_iter=3")
    assert len(calls) == 1
    run("a", "train.max_iter=6", resume=True)
    run("b", "train.max_iter=1", f"train.init_checkpoint={tmp_path}/a")
    evaluate(tiny_config(f"train.output_dir={tmp_path}/a"))
    assert len(calls) == 1


def test_a_checkpoint_of_an_older_version_is_refused_with_the_remedy(run, tmp_path):
    run("a", "train.max_iter=1")
    checkpoint = tmp_path / "a" / "checkpoints" / "0000001"
    replace(read_manifest(checkpoint), format_version=2).write(checkpoint)
    with pytest.raises(ValueError, match=r"older dn_detr.*init_checkpoint=.*0000001"):
        run("a", resume=True)


def test_another_optimizer_type_is_no_place_to_resume_into(run):
    run("a", "train.max_iter=1")
    with pytest.raises(ValueError, match="optimizer is AdamW, the config's SGD"):
        run("a", "train.max_iter=2", "optimizer._target_=torch.optim.SGD", resume=True)


def test_the_log_tells_why_a_run_failed(run, tmp_path):
    with pytest.raises(NonFiniteError):
        run("a", "model.nan_at=2")
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "ERROR iteration 2: loss terms loss_class not finite" in log and "what helps" in log


def test_weights_can_be_read_by_whoever_may_read_the_manifest(run, tmp_path):
    run("a", "train.max_iter=1")
    modes = {path.stat().st_mode for path in (tmp_path / "a" / "checkpoints" / "last").iterdir()}
    assert len(modes) == 1
