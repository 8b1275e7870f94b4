"""Checkpoints that several processes write together, and that any number of them loads."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    last_checkpoint,
    load_training_state,
    read_manifest,
    read_weights,
)
from dn_detr.checkpoint.files import read_file
from dn_detr.checkpoint.tensor_files import shard_name, share

from .writing import assert_equal, assert_holds, run_processes, save_shard, snapshot


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_and_whole_files_load_equal_on_every_process(tmp_path, world_size):
    with CheckpointWriter(tmp_path / "whole") as writer:
        writer.save(snapshot(2))
    shards = tmp_path / "shards"
    assert run_processes(world_size, save_shard, shards, world_size, None) == [""] * world_size
    folder = last_checkpoint(shards)
    assert_holds(folder, snapshot(2))
    assert_holds(shards / "checkpoints" / "0000001", snapshot(1))
    whole = last_checkpoint(tmp_path / "whole")
    assert_equal(read_weights(folder), read_weights(whole))
    assert_equal(load_training_state(folder), load_training_state(whole))
    assert_equal(read_file(folder / "ema.safetensors").tensors, dict(snapshot(2).ema))
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert names == set(read_manifest(folder).files)
    assert len(names) == 3 * world_size + 1
    assert shard_name("model.safetensors", world_size - 1, world_size) in names


def test_a_shard_that_is_missing_is_damage(tmp_path):
    run_processes(2, save_shard, tmp_path, 2, None)
    (tmp_path / "checkpoints" / "0000002" / "model-00002-of-00002.safetensors").unlink()
    assert last_checkpoint(tmp_path).name == "0000001"
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: missing"):
        read_weights(tmp_path / "checkpoints" / "last")


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ("dies", r"shards of processes \[1\] did not appear within 1 s.*shared file system"),
        ("has a full disk", r"process 1 failed: .*(File too large|os error 27)"),
    ],
)
def test_a_process_that_fails_leaves_the_previous_checkpoint(tmp_path, faulty, message):
    first, _ = run_processes(2, save_shard, tmp_path, 2, faulty)
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(first)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["0000001", "last"]
    assert_holds(last_checkpoint(tmp_path), snapshot(1))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 200])
def test_shares_are_complete_apart_and_about_equal(count):
    torch.manual_seed(0)
    tensors = {f"t{n}": torch.zeros(int(n)) for n in torch.randint(1, 1000, (100,)).unique()}
    shares = [share(tensors, rank, count) for rank in range(count)]
    names = [name for mine in shares for name in mine]
    assert sorted(names) == sorted(tensors)
    sizes = [sum(tensor.nbytes for tensor in mine.values()) for mine in shares]
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in tensors.values())
    backwards = dict(reversed(tensors.items()))
    assert [name for rank in range(count) for name in share(backwards, rank, count)] == names
