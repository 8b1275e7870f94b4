from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dn_detr.checkpoint import (
    CheckpointError,
    Snapshot,
    load_model_weights,
    load_tensors,
)
from tests.checkpoint.writing import save


def make_model(classes: int = 2) -> nn.Module:
    return nn.ModuleDict({"backbone": nn.Linear(3, 4), "head": nn.Linear(4, classes)})


def save_model(folder, model):
    return save(folder, Snapshot(1, 0.0, model.state_dict()))


def test_weights_load_from_every_path(tmp_path):
    source = make_model()
    checkpoint = save_model(tmp_path, source)
    save_file(source.state_dict(), tmp_path / "bare.safetensors")
    paths = [
        tmp_path,
        checkpoint,
        tmp_path / "checkpoints" / "last",
        checkpoint / "model.safetensors",
        tmp_path / "bare.safetensors",
    ]
    for path in paths:
        model = make_model()
        load_model_weights(model, path)
        for name, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), path


def test_names_of_classes_are_compared_without_a_row_per_class_too(tmp_path):
    model = make_model()
    save(tmp_path, Snapshot(1, 0.0, model.state_dict()), class_names=["dog", "cat"])
    load_model_weights(model, tmp_path, class_names=["dog", "cat"])
    load_model_weights(model, tmp_path, class_names=["dog"], fine_tune=True)
    both = r"the file has 2 classes \(dog, cat\), the data 1 class in 2 rows \(dog\)"
    with pytest.raises(CheckpointError, match=both):
        load_model_weights(model, tmp_path, class_names=["dog"])


def test_weights_under_the_names_of_the_model_need_no_known_layout():
    source = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])})})
    model = copy.deepcopy(source)
    nn.init.zeros_(model["encoder"]["layers"][0].weight)
    assert load_tensors(model, source.state_dict()).layout == "dn_detr"
    assert torch.equal(model["encoder"]["layers"][0].weight, source["encoder"]["layers"][0].weight)


def test_one_error_lists_all_that_differs(tmp_path):
    source = nn.ModuleDict({"backbone": nn.Linear(3, 4), "head": nn.Linear(4, 9)})
    source["neck"] = nn.Linear(1, 1)
    target = make_model()
    target["query"] = nn.Embedding(2, 2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_model_weights(target, save_model(tmp_path, source))
    message = str(error.value)
    assert "(dn_detr layout): 2 of the model's 5 tensors fit" in message
    assert "1 missing from the file:\n  query.weight" in message
    assert "2 unexpected in the file:\n  neck.bias\n  neck.weight" in message
    assert "2 of another shape:\n  head.weight (file (9, 4), model (2, 4))" in message
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])


def test_long_lists_are_cut_and_counted(tmp_path):
    target = nn.ModuleDict({f"layer{i}": nn.Linear(1, 1) for i in range(8)})
    with pytest.raises(CheckpointError, match=r"16 missing from the file:[\s\S]*and 6 more"):
        load_model_weights(target, save_model(tmp_path, make_model()))


def test_a_file_that_is_no_checkpoint_is_an_error_that_says_what_is(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"other.pth: not a checkpoint: neither a file of torch"
    ):
        load_model_weights(make_model(), tmp_path / "other.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"broken.safetensors: damaged or not"):
        load_model_weights(make_model(), tmp_path / "broken.safetensors")
