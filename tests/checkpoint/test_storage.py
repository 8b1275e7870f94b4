from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dn_detr.checkpoint import (
    CheckpointError,
    Snapshot,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    load_last_checkpoint,
    read_manifest,
    read_weights,
    record_metrics,
)
from dn_detr.checkpoint import manifest as manifest_module
from dn_detr.checkpoint import storage as storage_module
from dn_detr.checkpoint.manifest import file_digest

from . import writing
from .writing import snapshot

STATE = {"moments": torch.arange(4.0), "step": 3, "names": ["a", "b"], "random": (3, (1, 2), None)}


def save(folder: Path, iteration: int = 1, **options) -> Path:
    weights = {"layer.weight": torch.full((2, 3), float(iteration))}
    return writing.save(folder, Snapshot(iteration, 0.5, weights, training_state=STATE), **options)


def saved_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path):
    checkpoint = save(tmp_path, config="a: 1\n", class_names=["cat", "dog"])
    assert torch.equal(read_weights(checkpoint)["layer.weight"], torch.ones(2, 3))
    loaded = load_checkpoint(checkpoint).snapshot
    writing.assert_equal(loaded.training_state, STATE)
    assert (loaded.optimizer, loaded.ema) == ({}, None)
    manifest = read_manifest(checkpoint)
    assert (manifest.iteration, manifest.epoch, manifest.config) == (1, 0.5, "a: 1\n")
    assert manifest.class_names == ["cat", "dog"]
    assert manifest.versions["torch"] == torch.__version__


def test_aliases_and_views_of_one_tensor_are_saved(tmp_path):
    weight = torch.rand(4, 4)
    weights = {"a": weight, "alias": weight, "row": weight[1], "transposed": weight.T}
    checkpoint = writing.save(tmp_path, Snapshot(1, 0.0, weights))
    for name, value in read_weights(checkpoint).items():
        assert torch.equal(value, weights[name]), name


def test_last_is_a_relative_link_to_the_newest(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 20)
    assert os.readlink(tmp_path / "checkpoints" / "last") == "0000020"
    tmp_path.rename(tmp_path.with_name("moved"))
    assert last_checkpoint(tmp_path.with_name("moved")).name == "0000020"


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (5, 10, 15, 20):
        save(tmp_path, iteration, keep=2)
    assert saved_names(tmp_path) == ["0000015", "0000020", "last"]


def test_order_follows_iterations_beyond_seven_digits(tmp_path):
    for iteration in (9_999_999, 10_000_000):
        save(tmp_path, iteration, keep=1)
    assert saved_names(tmp_path) == ["10000000", "last"]


def test_leftovers_of_a_killed_save_are_invisible_and_then_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".0000002.partial").mkdir()
    (tmp_path / "checkpoints" / ".last.partial").symlink_to("0000002")
    assert last_checkpoint(tmp_path).name == "0000001"
    save(tmp_path, 2)
    assert saved_names(tmp_path) == ["0000001", "0000002", "last"]


def test_saving_an_iteration_again_replaces_it(tmp_path):
    save(tmp_path, 1, config="old")
    save(tmp_path, 1, config="new")
    assert read_manifest(tmp_path / "checkpoints" / "last").config == "new"
    assert saved_names(tmp_path) == ["0000001", "last"]


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path):
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/last", "checkpoints/0000001"])
def test_a_checkpoint_is_found_by_every_name_it_has(tmp_path, path):
    checkpoint = save(tmp_path, 1)
    assert find_checkpoint(tmp_path / path) == checkpoint.resolve()


def test_a_path_that_leads_to_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither a checkpoint folder"):
        find_checkpoint(tmp_path)


def test_metrics_can_be_added_later(tmp_path):
    checkpoint = save(tmp_path)
    assert read_manifest(checkpoint).metrics is None
    record_metrics(checkpoint, {"AP": 0.5, "per_class": {"cat": 0.25}})
    assert read_manifest(checkpoint).metrics == {"AP": 0.5, "per_class": {"cat": 0.25}}
    assert load_checkpoint(checkpoint).snapshot.training_state["step"] == 3


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_detected_and_names_the_file(tmp_path, name, damage):
    checkpoint = save(tmp_path, config="a: 1\n")
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        cut = {"flip": bytes(content), "truncate": bytes(content[:-7]), "empty": b""}[damage]
        path.write_bytes(cut)
    with pytest.raises(CheckpointError, match=name):
        read_weights(checkpoint)
        load_checkpoint(checkpoint)


def test_a_newer_format_is_an_error(tmp_path):
    checkpoint = save(tmp_path)
    content = json.loads((checkpoint / "manifest.json").read_text())
    content["format_version"] = 99
    del content["sha256"]
    content["sha256"] = manifest_module._digest_of_content(content)
    (checkpoint / "manifest.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(CheckpointError, match="newer dn_detr"):
        read_manifest(checkpoint)


class Exploit:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_training_state_that_would_run_code_is_not_loaded(tmp_path):
    checkpoint = save(tmp_path)
    torch.save({"x": Exploit(tmp_path / "ran")}, checkpoint / "training_state.pt")
    manifest = read_manifest(checkpoint)
    digests = {name: file_digest(checkpoint / name) for name in manifest.files}
    replace(manifest, files=digests).write(checkpoint)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which may not be loaded"):
        load_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_training_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    state = {"random": [1, {"x": Exploit(tmp_path / "ran")}]}
    with pytest.raises(CheckpointError, match=r"training_state\.random\.1\.x is of type Exploit"):
        writing.save(tmp_path, Snapshot(1, 0.0, {}, training_state=state))
    assert last_checkpoint(tmp_path) is None


def test_a_training_state_with_tuples_for_keys_is_not_saved(tmp_path):
    state = {"counts": {("a", 1): 2}}
    with pytest.raises(CheckpointError, match=r"training_state\.counts has a tuple for a key"):
        writing.save(tmp_path, Snapshot(1, 0.0, {}, training_state=state))


def test_of_an_older_format_the_weights_are_read_but_the_training_is_not_continued(tmp_path):
    checkpoint = save(tmp_path)
    replace(read_manifest(checkpoint), format_version=2).write(checkpoint)
    assert read_weights(tmp_path)["layer.weight"].shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"older dn_detr.*init_checkpoint=.*0000001"):
        load_last_checkpoint(tmp_path)


def test_each_file_is_verified_and_read_once(tmp_path, monkeypatch):
    writing.save(tmp_path, snapshot(1))
    read: list[str] = []

    def recording(function):
        def call(path, *arguments, **options):
            read.append(f"{function.__name__} {Path(path).name}")
            return function(path, *arguments, **options)

        return call

    for module, name in (
        (manifest_module, "file_digest"),
        (storage_module, "read_pickle"),
        (safetensors.torch, "load_file"),
    ):
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    load_last_checkpoint(tmp_path)
    assert sorted(read) == [
        "file_digest ema.safetensors",
        "file_digest model.safetensors",
        "file_digest training_state.pt",
        "load_file ema.safetensors",
        "load_file model.safetensors",
        "read_pickle training_state.pt",
    ]


def test_metrics_with_numbers_as_names_do_not_damage_the_manifest(tmp_path):
    checkpoint = save(tmp_path)
    record_metrics(checkpoint, {"per_class": {10: 0.1, 9: float("nan")}})
    assert read_manifest(checkpoint).metrics["per_class"]["10"] == 0.1
