from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dn_detr.distributed import all_gather, barrier, rank
from dn_detr.engine import Outcome, StepResult, launch
from dn_detr.engine.callbacks import DenoisingMetrics
from dn_detr.engine.metrics import (
    EVENTS,
    RankRecord,
    Record,
    RunningSums,
    evaluation_record,
    merge_records,
)
from dn_detr.modeling import Diagnostics

CPU = torch.device("cpu")
RATES = ("data_time", "iter_time", "images_per_s")
NO_RECORD = RankRecord({}, {}, 0.0)


def a_step(seed: int, names: tuple[str, ...] = ("loss_ce", "loss_ce_0")) -> StepResult:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(len(names), generator=generator)
    return StepResult(names, losses, torch.rand((), generator=generator))


def sums_of(*seeds: int) -> RunningSums:
    sums = RunningSums()
    add_steps(sums, *seeds)
    return sums


def add_steps(sums: RunningSums, *seeds: int) -> None:
    for seed in seeds:
        sums.add_step(a_step(seed))
        sums.add("accuracy", torch.tensor(seed), 10)
        sums.count("skipped_images", seed)
        sums.add_times(images=2, data_seconds=0.1, seconds=0.1 + seed)


def record_of(*ranks: RunningSums) -> Record:
    return merge_records([sums.of_this_rank(CPU) for sums in ranks])


def without_rates(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in RATES}


def test_records_are_means_over_the_iterations_since_the_last_one():
    sums = RunningSums()
    first = StepResult(("a", "b"), torch.tensor([1.0, 2.0]), torch.tensor(1.0))
    second = StepResult(("a", "b"), torch.tensor([5.0, 0.0]), torch.tensor(2.0))
    for result in (first, second):
        sums.add_step(result)
        sums.add_times(images=4, data_seconds=0.25, seconds=1.0)
    record = record_of(sums)
    assert (record["loss"], record["loss/a"], record["loss/b"]) == (4.0, 3.0, 1.0)
    assert record["grad_norm"] == 1.5
    assert [record[name] for name in RATES] == [0.25, 1.0, 4.0]


def test_a_count_weighs_a_mean():
    sums = RunningSums()
    sums.add("accuracy", torch.tensor(1), 1)
    sums.add("accuracy", 2, torch.tensor(9))
    assert record_of(sums)["accuracy"] == pytest.approx(0.3)


def test_a_mean_of_nothing_is_left_out():
    sums = RunningSums()
    sums.add("accuracy", torch.tensor(0), 0)
    assert "accuracy" not in record_of(sums)


def test_events_are_columns_from_the_first_record_on():
    record = record_of(sums_of(0))
    assert {name: record[name] for name in EVENTS} == dict.fromkeys(EVENTS, 0)


def test_skipped_steps_take_time_but_part_in_no_mean():
    sums = sums_of(1)
    mean = record_of(sums)["loss"]
    sums.add_times(images=2, data_seconds=0.1, seconds=2.9)
    sums.count("nonfinite_steps")
    record = record_of(sums)
    assert (record["loss"], record["nonfinite_steps"]) == (mean, 1)
    assert record["iter_time"] == pytest.approx(2.0)


def test_a_gradient_that_overflowed_does_not_hide_the_norms_of_the_other_steps():
    sums = RunningSums()
    for norm, outcome in ((1.0, "applied"), (float("inf"), "overflow"), (2.0, "applied")):
        step = StepResult(("a",), torch.ones(1), torch.tensor(norm), Outcome(outcome))
        sums.add_step(step)
    assert record_of(sums)["grad_norm"] == 1.5


def test_totals_and_counts_of_ranks_add_up():
    means: list[dict[str, tuple[float, float]]] = [
        {"accuracy": (1, 1), "there": (2, 1)}, {"accuracy": (0, 3)}, {},
    ]  # fmt: skip
    merged = merge_records([NO_RECORD._replace(means=one) for one in means])
    assert merged == {"accuracy": 0.25, "there": 2.0, "memory_mib": 0.0}


def test_sums_and_maxima_of_ranks_are_merged_as_such():
    one = RankRecord({}, {"images_per_s": 4.0, "skipped_images": 1}, memory_mib=10.0)
    other = RankRecord({}, {"images_per_s": 5.0, "skipped_images": 2}, memory_mib=30.0)
    assert merge_records([one, other]) == {
        "images_per_s": 9.0, "skipped_images": 3, "memory_mib": 30.0,
    }  # fmt: skip


def write_record(folder: str) -> None:
    sums = sums_of(*([1, 3] if rank() == 0 else [5]))
    record = merge_records(all_gather(sums.of_this_rank(CPU)._replace(memory_mib=1.0)))
    Path(folder, f"{rank()}.json").write_text(json.dumps(record))
    barrier()


@pytest.mark.slow
def test_two_processes_agree_on_the_record(tmp_path):
    launch(write_record, 2, str(tmp_path), device="cpu")
    records = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert records[0] == records[1]
    assert records[0] == record_of(sums_of(1, 3), sums_of(5)) | {"memory_mib": 1.0}
    assert records[0]["accuracy"] == pytest.approx((1 + 3 + 5) / 30)
    assert records[0]["skipped_images"] == 9


def stored(sums: RunningSums) -> bytes:
    file = io.BytesIO()
    torch.save(sums.state_dict(), file)
    return file.getvalue()


def test_sums_continue_after_a_checkpoint_to_the_bit():
    resumed = RunningSums()
    state = torch.load(io.BytesIO(stored(sums_of(1, 2, 3))), weights_only=True)
    resumed.add_state(state, CPU)
    add_steps(resumed, 4, 5)
    uninterrupted = sums_of(1, 2, 3, 4, 5)
    assert without_rates(record_of(resumed)) == without_rates(record_of(uninterrupted))


def test_rates_after_a_resume_are_those_of_the_iterations_since():
    resumed = RunningSums()
    resumed.add_state(sums_of(100).state_dict(), CPU)
    resumed.add_times(images=3, data_seconds=0.5, seconds=1.5)
    record = record_of(resumed)
    assert [record[name] for name in RATES] == [0.5, 1.5, 2.0]


def test_what_a_checkpoint_stores_does_not_depend_on_the_clock():
    fast, slow = sums_of(1), sums_of(1)
    slow.add_times(images=2, data_seconds=7.0, seconds=9.0)
    assert stored(fast) == stored(slow)


def test_results_of_an_evaluator_become_flat_names():
    assert evaluation_record({"AP": 0.5, "per_class": {"traffic light": 0.25}}) == {
        "eval/AP": 0.5,
        "eval/per_class/traffic light": 0.25,
    }


def denoising_record(*steps: StepResult) -> Record:
    """What `DenoisingMetrics` adds to a log record."""
    state, callback = SimpleNamespace(metrics=RunningSums()), DenoisingMetrics()
    for step in steps:
        callback.after_step(state, [], step)
    others = (*RATES, *EVENTS, "memory_mib")
    return {k: v for k, v in record_of(state.metrics).items() if k not in others}


def test_terms_of_the_denoising_are_summed_apart_from_all_others():
    names = ("loss_ce", "loss_ce_0", "loss_ce_enc", "loss_ce_dn", "loss_ce_dn_0", "loss_dnx")
    first = StepResult(
        names,
        torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),
        torch.tensor(1.0),
        diagnostics=(Diagnostics((), torch.tensor(3), 4), Diagnostics((), torch.tensor(1), 4)),
    )
    broken = first._replace(
        losses=torch.full((6,), torch.nan), outcome=Outcome.NONFINITE, diagnostics=()
    )
    second = first._replace(losses=2 * first.losses, diagnostics=())
    assert denoising_record(first, broken, second) == {
        "loss_matching": 1.5 * 39,
        "loss_denoising": 1.5 * 24,
        "denoising_accuracy": 0.5,
    }


def test_a_model_without_denoising_has_no_metrics_of_it():
    found = (Diagnostics((), torch.tensor(0), 0),)
    assert denoising_record(a_step(1)._replace(diagnostics=found)) == {}
