"""What an error says about a file that does not fit, and what to do about it."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import (
    CheckpointError,
    load_tensors,
    read_weights,
)
from dn_detr.modeling.backbones import ResNet
from tests.checkpoint.tiny_models import tiny_model

DEFORMABLE = "dn_deformable_detr_r50"


def message_of(model, tensors, **options):
    with pytest.raises(CheckpointError) as error:
        load_tensors(model, tensors, what="f.pth", **options)
    return str(error.value)


def test_other_classes_alone_are_told_in_one_line():
    state = tiny_model("dab_detr_r50", num_classes=5).state_dict()
    model = tiny_model("dab_detr_r50", num_classes=3)
    assert message_of(model, state) == (
        "f.pth: trained on other classes: the file has 5 classes without names, "
        "the model 3 classes without names; use data with the same list of categories and "
        "model.num_classes=5, or train from it with train.init_checkpoint"
    )


def test_other_classes_of_another_model_are_told_with_all_the_rest():
    state = tiny_model("dab_detr_r50", num_classes=5).state_dict()
    message = message_of(tiny_model(DEFORMABLE, num_classes=3), state)
    assert message.startswith("f.pth: the weights of another model (dn_detr layout): ")
    assert "\nthe file has 5 classes" in message and "unexpected in" in message


def test_a_file_that_lacks_tensors_is_incomplete():
    state = tiny_model("dab_detr_r50").state_dict()
    total = len([name for name in state if not name.endswith("num_batches_tracked")])
    del state["neck.convs.0.weight"]
    message = message_of(tiny_model("dab_detr_r50"), state)
    assert message == (
        f"f.pth: incomplete (dn_detr layout): {total - 1} of the model's {total} tensors fit\n"
        "1 missing from the file:\n  neck.convs.0.weight\n"
        "Use the config that it was trained with; a checkpoint of ours has it in manifest.json"
    )


def test_half_a_backbone_is_incomplete():
    body = ResNet("resnet18").body.state_dict()
    half = {name: value for name, value in body.items() if not name.startswith("layer4")}
    message = message_of(tiny_model("dab_detr_r50"), half, fine_tune=True)
    assert "incomplete (torchvision layout): 75 of the model's 100 tensors fit" in message
    assert "\n25 missing from the file:" in message


def test_a_backbone_alone_has_its_own_sentence():
    body = ResNet("resnet18").body.state_dict()
    assert message_of(tiny_model("dab_detr_r50"), body) == (
        "f.pth: a backbone alone (torchvision layout), which detects nothing; train from it with "
        "train.init_checkpoint"
    )


def test_a_deeper_backbone_alone_is_the_weights_of_a_larger_model():
    body = ResNet("resnet34").body.state_dict()
    message = message_of(tiny_model("dab_detr_r50"), body, fine_tune=True)
    assert message.startswith("f.pth: the weights of a larger model (torchvision layout)")
    assert "unexpected in the file" in message


def test_a_file_that_has_more_than_the_model_is_one_of_a_larger_model():
    model = tiny_model("dab_detr_r50")
    state = {**model.state_dict(), "quality.weight": torch.zeros(1)}
    message = message_of(model, state, fine_tune=True)
    assert message.startswith("f.pth: the weights of a larger model (dn_detr layout): ")
    assert "1 unexpected in the file:\n  quality.weight\nUse the config that" in message


@pytest.mark.parametrize("path", ["Org/name", "IDEA-Research/dab-detr_r50"])
def test_what_may_be_an_id_of_hugging_face_is_to_be_downloaded(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    assert str(error.value) == (
        f"{path}: no such file or folder; if this is an id of Hugging Face, download it first: "
        f"hf download {path} --local-dir FOLDER"
    )


@pytest.mark.parametrize("path", ["name", "a/b/c", "/a/b", "/a", "weights/f.pth", "../a", "~/a"])
def test_no_other_path_is_taken_for_an_id(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file or folder$"):
        read_weights(path)


@pytest.mark.parametrize("name", ["f.pth", "f.safetensors"])
def test_a_truncated_file_is_to_be_fetched_again(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError, match=r"damaged or .*; download or copy it again$"):
        read_weights(tmp_path / name)
