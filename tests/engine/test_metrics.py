from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from dn_detr.distributed import barrier, rank
from dn_detr.engine import StepResult, launch
from dn_detr.engine.metrics import (
    EVENTS,
    Interval,
    Ratio,
    average_over_ranks,
    evaluation_row,
    merge_rows,
)

CPU = torch.device("cpu")
RATES = ("data_time", "iter_time", "images_per_s")


def a_step(seed: int, names: tuple[str, ...] = ("loss_ce", "loss_ce_0")) -> StepResult:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(len(names), generator=generator)
    return StepResult(names, losses, torch.rand((), generator=generator))


def interval_of(*seeds: int) -> Interval:
    interval = Interval()
    add_steps(interval, *seeds)
    return interval


def add_steps(interval: Interval, *seeds: int) -> None:
    for seed in seeds:
        interval.record(a_step(seed), images=2, data_seconds=0.1, seconds=0.1 + seed)
        interval.record_denoising(torch.tensor(seed), 10)
        interval.count("skipped_images", seed)


def without_rates(row):
    return {name: value for name, value in row.items() if name not in RATES}


def test_averages_are_means_over_the_iterations_of_the_interval():
    interval = Interval()
    first = StepResult(("a", "b"), torch.tensor([1.0, 2.0]), torch.tensor(1.0))
    second = StepResult(("a",), torch.tensor([5.0]), torch.tensor(2.0))
    for result in (first, second):
        interval.record(result, images=4, data_seconds=0.25, seconds=1.0)
    row = interval.averages()
    assert row["loss"] == pytest.approx(4.0)
    assert (row["loss/a"], row["loss/b"], row["grad_norm"]) == (3.0, 2.0, 1.5)
    assert (row["data_time"], row["iter_time"], row["images_per_s"]) == (0.25, 1.0, 4.0)


def test_matching_and_denoising_losses_are_summed_apart_over_all_layers():
    names = ("loss_ce", "loss_ce_0", "loss_ce_enc", "loss_ce_dn", "loss_ce_dn_0")
    interval = Interval()
    for scale in (1.0, 3.0):
        losses = scale * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
        result = StepResult(names, losses, torch.tensor(1.0))
        interval.record(result, images=1, data_seconds=0.0, seconds=1.0)
    row = interval.averages()
    assert (row["loss_matching"], row["loss_denoising"], row["loss"]) == (14.0, 48.0, 62.0)


def test_without_denoising_there_are_no_sums_and_no_accuracy():
    row = Interval()
    row.record(a_step(0), images=1, data_seconds=0.0, seconds=1.0)
    merged = average_over_ranks(row.averages())
    assert not {"loss_matching", "loss_denoising", "denoising_accuracy"} & merged.keys()


def test_denoising_accuracy_counts_boxes_not_iterations():
    interval = Interval()
    interval.record_denoising(torch.tensor(1), 1)
    interval.record_denoising(torch.tensor(2), 9)
    assert average_over_ranks(interval.averages())["denoising_accuracy"] == pytest.approx(0.3)


def test_an_interval_without_any_noised_box_has_no_accuracy():
    interval = interval_of(1)
    interval.denoising_total = 0
    assert "denoising_accuracy" not in average_over_ranks(interval.averages())


def test_events_are_columns_from_the_first_row_on():
    row = interval_of(0).averages()
    assert {name: row[name] for name in EVENTS} == dict.fromkeys(EVENTS, 0)


def test_skipped_steps_take_time_but_part_in_no_mean():
    interval = interval_of(1)
    mean = interval.averages()["loss"]
    interval.record(None, images=2, data_seconds=0.1, seconds=2.9)
    interval.count("nonfinite_steps")
    row = interval.averages()
    assert (row["loss"], row["nonfinite_steps"]) == (mean, 1)
    assert row["iter_time"] == pytest.approx(2.0)


def test_an_interval_of_skipped_steps_has_no_loss():
    interval = Interval()
    interval.record(None, images=2, data_seconds=0.1, seconds=1.0)
    row = average_over_ranks(interval.averages())
    assert row["loss"] is None and row["grad_norm"] is None


def test_a_gradient_that_overflowed_does_not_hide_the_norms_of_the_other_steps():
    interval = Interval()
    for norm in (1.0, float("inf"), 2.0):
        result = StepResult(("a",), torch.ones(1), torch.tensor(norm))
        interval.record(result, images=1, data_seconds=0.0, seconds=1.0)
    assert interval.averages()["grad_norm"] == 1.5


def test_a_row_is_the_mean_over_the_processes_that_have_a_number():
    merged = merge_rows([{"loss": 1.0}, {"loss": 3.0, "loss/there": 2.0}, {"loss": None}])
    assert merged == {"loss": 2.0, "loss/there": 2.0}


def test_images_add_up_over_processes_and_steps_do_not():
    one = {"images_per_s": 4.0, "skipped_images": 1, "nonfinite_steps": 2, "memory_mib": 10.0}
    other = {"images_per_s": 5.0, "skipped_images": 2, "nonfinite_steps": 2, "memory_mib": 30.0}
    assert merge_rows([one, other]) == {
        "images_per_s": 9.0, "skipped_images": 3, "nonfinite_steps": 2, "memory_mib": 30.0,
    }  # fmt: skip


def test_a_ratio_is_one_over_all_processes():
    rows = [{"accuracy": Ratio(1, 1)}, {"accuracy": Ratio(0, 3)}, {}]
    assert merge_rows(rows) == {"accuracy": 0.25}


def write_row(folder: str) -> None:
    interval = interval_of(*([1, 3] if rank() == 0 else [5]))
    row = average_over_ranks(interval.averages())
    Path(folder, f"{rank()}.json").write_text(json.dumps(row))
    barrier()


@pytest.mark.slow
def test_two_processes_agree_on_the_row(tmp_path):
    launch(write_row, 2, str(tmp_path), device="cpu")
    rows = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert rows[0] == rows[1]
    assert rows[0] == merge_rows([interval_of(1, 3).averages(), interval_of(5).averages()])
    assert rows[0]["denoising_accuracy"] == pytest.approx((1 + 3 + 5) / 30)
    assert rows[0]["skipped_images"] == 9


def test_an_interval_continues_after_a_checkpoint_to_the_bit(tmp_path):
    torch.save(interval_of(1, 2, 3).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Interval.from_state_dict(state, CPU)
    add_steps(resumed, 4, 5)
    uninterrupted = interval_of(1, 2, 3, 4, 5)
    assert without_rates(resumed.averages()) == without_rates(uninterrupted.averages())


def test_rates_after_a_resume_are_those_of_the_iterations_since():
    resumed = Interval.from_state_dict(interval_of(100).state_dict(), CPU)
    resumed.record(a_step(0), images=3, data_seconds=0.5, seconds=1.5)
    row = resumed.averages()
    assert [row[name] for name in RATES] == [0.5, 1.5, 2.0]


def test_what_a_checkpoint_stores_does_not_depend_on_the_clock():
    def stored(seconds: float) -> bytes:
        interval = Interval()
        interval.record(a_step(1), images=2, data_seconds=seconds, seconds=2 * seconds)
        file = io.BytesIO()
        torch.save(interval.state_dict(), file)
        return file.getvalue()

    assert stored(0.1) == stored(0.7)


def test_results_of_an_evaluator_become_flat_names():
    assert evaluation_row({"AP": 0.5, "per_class": {"traffic light": 0.25}}) == {
        "eval/AP": 0.5,
        "eval/per_class/traffic light": 0.25,
    }
