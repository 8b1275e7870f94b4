from __future__ import annotations

import json

import pytest
import torch

from dn_detr.engine import metrics
from dn_detr.engine.metrics import Interval, MetricsWriter, evaluation_row

CPU = torch.device("cpu")


def make_interval() -> Interval:
    interval = Interval(data_seconds=0.5, seconds=2.0, images=8)
    interval.losses = [(("a", "b"), torch.tensor([1.0, 2.0])), (("a",), torch.tensor([5.0]))]
    interval.grad_norms = [torch.tensor(1.0), torch.tensor(2.0)]
    return interval


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_averages_are_means_over_the_iterations_of_the_interval():
    row = make_interval().averages()
    assert row["loss"] == pytest.approx(4.0)
    assert (row["loss/a"], row["loss/b"], row["grad_norm"]) == (3.0, 2.0, 1.5)
    assert (row["data_time"], row["iter_time"], row["images_per_s"]) == (0.25, 1.0, 4.0)


def test_a_row_is_the_mean_over_processes_and_images_per_second_add_up(monkeypatch):
    other = {"loss": 3.0, "images_per_s": 5.0, "loss/only_there": 2.0}
    monkeypatch.setattr(metrics, "all_gather", lambda row: [row, other])
    row = metrics.average_over_ranks({"loss": 1.0, "images_per_s": 4.0})
    assert row == {"loss": 2.0, "images_per_s": 9.0, "loss/only_there": 2.0}


def test_an_interval_survives_a_checkpoint(tmp_path):
    torch.save(make_interval().state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert Interval.from_state_dict(state, CPU).averages() == make_interval().averages()


def test_results_of_an_evaluator_become_flat_names():
    assert evaluation_row({"AP": 0.5, "per_class": {"traffic light": 0.25}}) == {
        "eval/AP": 0.5,
        "eval/per_class/traffic light": 0.25,
    }


def test_what_is_not_finite_is_stored_as_null_so_that_every_line_is_json(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"iteration": 1, "grad_norm": float("inf"), "loss": 1.0})
    writer.close()
    assert rows(tmp_path) == [{"iteration": 1, "grad_norm": None, "loss": 1.0}]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    MetricsWriter(tmp_path, 0).close()
    assert rows(tmp_path) == []


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_resuming_drops_later_rows_half_written_ones_and_an_evaluation_to_be_repeated(
    tmp_path, is_evaluated
):
    lines = ['{"iteration": 1}', '{"iteration": 2}', '{"iteration": 2, "eval/AP": 0.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 3}', '{"iter']))
    MetricsWriter(tmp_path, 2, is_evaluated=is_evaluated).close()
    kept = lines if is_evaluated else lines[:2]
    assert rows(tmp_path) == [json.loads(line) for line in kept]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, 0)
    writer.write({"iteration": 4, "loss": 1.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 1.5)]
