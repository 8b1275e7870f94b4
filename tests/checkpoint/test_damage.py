"""Damaged checkpoints are noticed, whatever is damaged, and replaced only where that is meant."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from dn_detr.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    Manifest,
    Snapshot,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    read_manifest,
    read_weights,
)
from dn_detr.checkpoint import manifest as manifest_module
from dn_detr.checkpoint.files import read_file

from .writing import snapshot

DAMAGES = ("truncate", "zero", "flip")


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 10, 20 and 30, of which 10 is the best."""
    with CheckpointWriter(tmp_path, class_names=["cat"]) as writer:
        for iteration in (10, 20, 30):
            writer.save(snapshot(iteration, size=20))
            writer.record_evaluation(iteration, {"AP": 0.5}, is_best=iteration == 10)
    return tmp_path


def train_and_save(folder):
    """Two steps of a small detector-like model, each saved with everything that a run has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    config = "train: {seed: 1, note: 'é'}\n" * 20
    with CheckpointWriter(folder, config=config, class_names=["Katze", "Bär"]) as writer:
        for iteration in (1, 2):
            model(torch.rand(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            state = {"random": torch.get_rng_state(), "scaler": {"scale": 1.0}}
            weights = model.state_dict()
            writer.save(
                Snapshot(iteration, 0.5, weights, optimizer.state_dict(), state, ema=weights)
            )
            writer.record_evaluation(iteration, {"AP": 0.1234, "per_class": {"Bär": 0.5}})


def damaged(content, kind):
    """Cut a file, set a range of it to zero, or flip one bit."""
    while True:
        data = bytearray(content)
        start = random.randrange(len(data))
        if kind == "truncate":
            del data[start:]
        elif kind == "zero":
            end = min(len(data), start + random.randrange(1, 4096))
            data[start:end] = bytes(end - start)
        else:
            data[start] ^= 1 << random.randrange(8)
        if data != content:
            return bytes(data)


def test_damage_at_a_random_place_is_noticed_300_times_of_300(tmp_path, caplog):
    random.seed(0)
    train_and_save(tmp_path)
    last, previous = last_checkpoint(tmp_path), tmp_path / "checkpoints" / "0000001"
    files = sorted(path for path in last.iterdir() if path.is_file())
    assert len(files) == 4
    detected = 0
    for kind in DAMAGES:
        for _ in range(100):
            path = random.choice(files)
            content = path.read_bytes()
            path.write_bytes(damaged(content, kind))
            caplog.clear()
            used = last_checkpoint(tmp_path)
            (record,) = caplog.records
            is_loud = record.levelno == logging.ERROR and str(path) in record.message
            detected += used == previous.resolve() and is_loud
            path.write_bytes(content)
    print(f"{detected} of 300 damages were noticed")
    assert detected == 300
    caplog.clear()
    assert last_checkpoint(tmp_path) == last  # and without damage there is no alarm
    assert caplog.records == []


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    train_and_save(tmp_path)
    folder = tmp_path / "alone"
    folder.mkdir()
    content = (last_checkpoint(tmp_path) / "manifest.json").read_bytes()
    assert rb"\u00e9" in content  # E9 would mean the same
    (folder / "manifest.json").write_bytes(content)
    Manifest.read(folder)
    descriptor = os.open(folder / "manifest.json", os.O_WRONLY)
    try:
        for place in range(len(content)):
            bit = 1 << random.randrange(8) if content[place : place + 1] != b"e" else 0x20
            os.pwrite(descriptor, bytes([content[place] ^ bit]), place)
            with pytest.raises(CheckpointError):
                Manifest.read(folder)
            os.pwrite(descriptor, content[place : place + 1], place)
    finally:
        os.close(descriptor)
    Manifest.read(folder)


def test_white_space_after_the_manifest_is_damage(run):
    with (run / "checkpoints/last/manifest.json").open("a") as file:
        file.write("\n")
    assert last_checkpoint(run).name == "0000020"


@pytest.mark.parametrize(
    "file",
    ["manifest.json", "model.safetensors", "ema.safetensors", "training_state.pt"],
)
def test_a_file_that_is_missing_is_damage(run, file, caplog):
    (run / "checkpoints" / "0000030" / file).unlink()
    assert last_checkpoint(run).name == find_checkpoint(run).name == "0000020"
    assert file in caplog.text


def test_several_damaged_ones_are_passed_over(run, caplog):
    for name in ("0000030", "0000020"):
        (run / "checkpoints" / name / "ema.safetensors").write_bytes(b"")
    assert last_checkpoint(run).name == "0000010"
    (record,) = caplog.records
    assert "0000030/ema.safetensors" in record.message
    assert "0000020/ema.safetensors" in record.message


def test_without_a_good_one_the_damage_of_each_is_listed(run):
    for name in ("0000010", "0000020", "0000030"):
        (run / "checkpoints" / name / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)none .*0000030/m.*0000020/m.*0000010/m"):
        last_checkpoint(run)


@pytest.mark.parametrize("target", [None, "0000040"])
def test_a_last_that_leads_nowhere_is_replaced_by_the_newest_loudly(run, caplog, target):
    link = run / "checkpoints" / "last"
    link.unlink()
    if target:
        link.symlink_to(target)
    assert last_checkpoint(run).name == "0000030"
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert (f"points at {target}" if target else "is missing") in record.message


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_link_to_itself_is_one_that_leads_nowhere(run, caplog, name):
    link = run / "checkpoints" / name
    link.unlink()
    link.symlink_to(name)
    assert last_checkpoint(run).name == "0000030"
    assert ("points at last, which is not there" in caplog.text) == (name == "last")
    with pytest.raises(CheckpointError, match=rf"{name}: .*points at {name}.*undamaged"):
        read_weights(link)
    with CheckpointWriter(run, keep=2) as writer:
        writer.save(snapshot(40))
        writer.wait()
    assert last_checkpoint(run).name == "0000040"


OTHER_CONTENT = {
    "a further key": {"signature": "x"},
    "a missing key": {"files": None},
    "iteration of text": {"iteration": "30"},
    "negative iteration": {"iteration": -1},
    "huge iteration": {"iteration": 10**4000},
    "epoch of text": {"epoch": "1"},
    "list of files": {"files": ["model.safetensors"]},
    "digest that is a number": {"files": {"model.safetensors": 3}},
    "class names that are a text": {"class_names": "cat"},
    "class names that are numbers": {"class_names": [1]},
    "metrics that are a list": {"metrics": [1]},
    "config that is a dict": {"config": {}},
    "version that is a text": {"format_version": "3"},
}


@pytest.mark.parametrize("case", OTHER_CONTENT)
def test_a_manifest_with_its_own_digest_but_other_content_is_refused(run, case):
    folder = run / "checkpoints" / "0000030"
    content = json.loads((folder / "manifest.json").read_text())
    content |= OTHER_CONTENT[case]
    content = {name: value for name, value in content.items() if value is not None}
    del content["sha256"]
    content["sha256"] = manifest_module._digest_of_content(content)
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))
    for read in (read_manifest, load_checkpoint, read_weights):
        with pytest.raises(CheckpointError, match=r"manifest\.json: (damaged|written by a newer)"):
            read(folder)


@pytest.mark.parametrize("state", [[1], {"a": 1}, {"optimizer": 3}])
def test_a_training_state_of_other_content_is_refused(run, state):
    folder = run / "checkpoints" / "0000030"
    torch.save(state, folder / "training_state.pt")
    manifest = read_manifest(folder)
    digest = manifest_module.file_digest(folder / "training_state.pt")
    replace(manifest, files={**manifest.files, "training_state.pt": digest}).write(folder)
    with pytest.raises(CheckpointError, match=r"training_state\.pt: not the state of a training"):
        load_checkpoint(folder)


def test_a_manifest_does_not_lead_out_of_its_folder(run):
    folder = run / "checkpoints" / "0000030"
    digest = manifest_module.file_digest(run / "checkpoints/0000020/model.safetensors")
    outside = {"../0000020/model.safetensors": digest}
    manifest = read_manifest(folder)
    replace(manifest, files={**manifest.files, **outside}).write(folder)
    assert last_checkpoint(run).name == "0000020"


def test_a_last_without_any_checkpoint_is_an_error(run):
    for folder in (run / "checkpoints").glob("0*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="none of the checkpoints can be used"):
        last_checkpoint(run)


def test_an_earlier_one_is_preferred_to_one_of_an_abandoned_future(run):
    link = run / "checkpoints" / "last"
    link.unlink()
    link.symlink_to("0000020")
    assert last_checkpoint(run).name == "0000020"
    (run / "checkpoints" / "0000020" / "model.safetensors").write_bytes(b"")
    assert last_checkpoint(run).name == "0000010"
    (run / "checkpoints" / "0000010" / "model.safetensors").write_bytes(b"")
    assert last_checkpoint(run).name == "0000030"


@pytest.mark.parametrize("name", ["0000030", "last"])
@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_checkpoint_that_is_named_is_not_replaced_by_another(run, name, file, how):
    path = run / "checkpoints" / "0000030" / file
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-1])
    named = run / "checkpoints" / name
    good = rf"{file}.*undamaged beside it: \S+0000010, \S+0000020$"
    for wanted in (named, named / "model.safetensors"):
        with pytest.raises(CheckpointError, match=good):
            read_weights(wanted)
    if file == "manifest.json":
        for read in (load_checkpoint, read_manifest):
            with pytest.raises(CheckpointError, match=good):
                read(named)


def test_a_damaged_training_state_does_not_stand_in_the_way_of_the_weights(run):
    last = run / "checkpoints" / "last"
    (last / "training_state.pt").write_bytes(b"")
    assert read_weights(last)["c.bias"].tolist() == [30, 30, 30]
    with pytest.raises(CheckpointError, match=r"training_state\.pt.*0000020"):
        load_checkpoint(last)


def test_a_link_that_leads_nowhere_is_an_error_that_names_the_good_ones(run):
    (run / "checkpoints" / "best").unlink()
    with pytest.raises(CheckpointError, match=r"best: .* is missing; undamaged .*0000010"):
        find_checkpoint(run / "checkpoints" / "best")


def test_an_ema_is_read_by_its_file(run):
    path = run / "checkpoints" / "best" / "ema.safetensors"
    content = read_file(path)
    assert content.tensors["c.bias"].tolist() == [10.5, 10.5, 10.5]
    assert content.class_names == ("cat",)
    assert read_file(path.parent, ema=True).tensors["c.bias"].tolist() == [10.5, 10.5, 10.5]
    raw = read_file(path.parent)
    assert raw.tensors["c.bias"].tolist() == [10, 10, 10]
    assert "an EMA (ema.safetensors), which was not taken" in raw.notes[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: damaged.*0000020"):
        read_file(path)


def test_an_ema_that_was_not_saved_is_an_error_with_the_remedy(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        writer.save(Snapshot(1, 0.1, {"w": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"no EMA.*train\.ema\.enabled=true"):
        read_file(tmp_path / "checkpoints" / "last" / "ema.safetensors")
