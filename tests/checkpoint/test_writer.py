"""CheckpointWriter: what it writes, keeps, refuses and reports."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from dn_detr.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    NonFiniteWeightsError,
    Snapshot,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    read_manifest,
    read_weights,
)

from .writing import assert_equal, assert_holds, snapshot


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def writer(request, tmp_path):
    with CheckpointWriter(tmp_path, asynchronous=request.param) as writer:
        yield writer


def saved_names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_everything_that_is_saved_comes_back(writer, tmp_path):
    writer.save(snapshot(7))
    writer.wait()
    assert writer.latest == last_checkpoint(tmp_path)
    assert_holds(writer.latest, snapshot(7))
    assert list(read_manifest(writer.latest).files) == [
        "ema.safetensors",
        "model.safetensors",
        "training_state.pt",
    ]


def test_the_optimizer_of_torch_continues_from_what_is_loaded(writer):
    parameter = nn.Parameter(torch.arange(4.0))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.1))

    def step():
        parameter.grad = parameter.detach() + 1
        optimizer.step()

    step()
    writer.save(Snapshot(1, 0.1, {"p": parameter}, optimizer.state_dict()))
    step()
    expected = parameter.detach().clone()
    writer.wait()
    with torch.no_grad():
        parameter.copy_(read_weights(writer.latest)["p"])
    optimizer.load_state_dict(load_checkpoint(writer.latest).snapshot.optimizer)
    step()
    assert torch.equal(parameter.detach(), expected)


def test_asynchronous_writing_never_sees_later_changes(tmp_path):
    state, expected = snapshot(5, size=2_000_000), snapshot(5, size=2_000_000)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(state)
        for tensor in (*state.model.values(), *state.ema.values()):
            tensor.zero_()
        for moments in state.optimizer["state"].values():
            moments["exp_avg"].zero_()
        state.optimizer["param_groups"][0]["lr"] = 0.0
        state.training_state["processes"].clear()
        is_still_writing = last_checkpoint(tmp_path) is None
        writer.wait()
    assert is_still_writing
    assert_holds(last_checkpoint(tmp_path), expected)


def test_a_save_does_not_overwrite_the_memory_of_the_one_before(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        for iteration in (1, 2, 3):
            writer.save(snapshot(iteration, size=500_000))
    for iteration in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"{iteration:07d}"
        assert_holds(folder, snapshot(iteration, size=500_000))


def test_no_thread_outlives_close(tmp_path):
    before = threading.active_count()
    writer = CheckpointWriter(tmp_path)
    writer.save(snapshot(1))
    assert threading.active_count() == before + 1
    writer.close()
    assert threading.active_count() == before
    assert_holds(last_checkpoint(tmp_path), snapshot(1))


def test_a_state_that_was_loaded_can_be_saved_again(writer):
    writer.save(snapshot(1))
    writer.wait()
    loaded = load_checkpoint(writer.latest).snapshot
    writer.save(replace(loaded, iteration=2))
    writer.wait()
    assert_holds(writer.latest, replace(snapshot(1), iteration=2))


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_and_the_good_one_stays(writer, part, value):
    writer.save(snapshot(1))
    writer.wait()
    broken = snapshot(2)
    if part == "optimizer":
        broken.optimizer["state"][1]["exp_avg"][3, 1] = value
        name = r"optimizer\.state\.1\.exp_avg"
    else:
        getattr(broken, part)["b.weight"][3, 1] = value
        name = rf"{part}\.b\.weight"
    with pytest.raises(NonFiniteWeightsError, match=rf"1 tensors hold NaN or infinity \({name}\)"):
        writer.save(broken)
    folder = writer.latest.parent
    assert sorted(path.name for path in folder.iterdir()) == ["0000001", "last"]
    assert_holds(find_checkpoint(folder / "last"), snapshot(1))


def test_at_most_five_broken_tensors_are_named(writer):
    weights = {f"w{index}": torch.tensor([float("nan")]) for index in range(7)}
    with pytest.raises(NonFiniteWeightsError, match=r"7 tensors .*w0.*w4 and 2 more"):
        writer.save(Snapshot(1, 0.1, weights))


def test_large_finite_numbers_are_saved(writer):
    weights = {"w": torch.full((10,), 3e38), "n": torch.tensor([2**62]), "b": torch.tensor([True])}
    writer.save(Snapshot(1, 0.1, {**weights, "empty": torch.zeros(0, 3)}))
    writer.wait()
    assert_equal(read_weights(writer.latest)["w"], weights["w"])


def test_evaluations_are_recorded_behind_the_save(writer, tmp_path):
    metrics = {"AP": 0.5}
    writer.save(snapshot(1))
    writer.record_evaluation(1, metrics, is_best=True)
    metrics["AP"] = 0.0
    writer.save(snapshot(2))
    writer.record_evaluation(2, {"AP": 0.4})
    writer.wait()
    best = find_checkpoint(tmp_path / "checkpoints" / "best")
    assert (best.name, read_manifest(best).metrics) == ("0000001", {"AP": 0.5})
    assert read_manifest(last_checkpoint(tmp_path)).metrics == {"AP": 0.4}
    assert_holds(best, snapshot(1))


def test_an_evaluation_without_a_checkpoint_is_a_failure(writer):
    writer.record_evaluation(3, {"AP": 0.5}, is_best=True)
    with pytest.raises(CheckpointError, match=r"0000003.* not recorded"):
        writer.wait()


def test_the_newest_and_the_best_are_kept(tmp_path):
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for iteration in range(1, 7):
            writer.save(snapshot(iteration))
            writer.record_evaluation(iteration, {}, is_best=iteration in (1, 3))
    assert saved_names(tmp_path) == ["0000003", "0000005", "0000006", "best", "last"]
    assert_holds(tmp_path / "checkpoints" / "best", snapshot(3))


def test_going_on_from_an_earlier_one_removes_the_abandoned_future(tmp_path):
    with CheckpointWriter(tmp_path, keep=3) as writer:
        for iteration in (1, 2, 8, 9, 3):
            writer.save(snapshot(iteration))
    assert saved_names(tmp_path) == ["0000002", "0000003", "last"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, caplog):
    with CheckpointWriter(tmp_path) as writer:
        writer.save(snapshot(1))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "0000001").rename(checkpoints / ".0000001.replaced")
    assert_holds(last_checkpoint(tmp_path), snapshot(1))
    assert "points at 0000001, which is not there" in caplog.text
    with CheckpointWriter(tmp_path) as writer:
        writer.save(snapshot(2))
    assert saved_names(tmp_path) == ["0000001", "0000002", "last"]
    assert_holds(checkpoints / "0000001", snapshot(1))


def test_failures_are_told_once(writer, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer.save(snapshot(1))
    with pytest.raises(CheckpointError, match="make sure that the folder can be written to") as e:
        writer.wait()
    assert str(tmp_path / "checkpoints") in str(e.value)
    assert writer.failures() == []
    writer.wait()
    (tmp_path / "checkpoints").unlink()
    writer.save(snapshot(1))
    writer.wait()
    assert_holds(writer.latest, snapshot(1))


def test_failures_that_were_not_asked_for_are_logged_at_the_end(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with CheckpointWriter(tmp_path) as writer:
        writer.save(snapshot(1))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "checkpoint 0000001 was not saved" in record.message


def test_ranks_above_0_write_nothing(tmp_path):
    with CheckpointWriter(tmp_path, rank=1) as writer:
        writer.save(snapshot(1))
        writer.record_evaluation(1, {})
        writer.wait()
    assert list(tmp_path.iterdir()) == []
