"""Converting between layouts, and what a converted checkpoint is good for."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import (
    CheckpointError,
    Snapshot,
    convert_checkpoint,
    last_checkpoint,
    load_checkpoint,
    load_model_weights,
    read_manifest,
    read_weights,
    save_weights,
)
from dn_detr.checkpoint.coco_classes import COCO_NAMES
from tests.checkpoint.layouts import to_layout
from tests.checkpoint.tiny_models import assert_same_state, tiny_model
from tests.checkpoint.writing import save


def save_run(folder, model, **options):
    return save(folder, Snapshot(3, 1.0, model.state_dict()), **options)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dn_detr_r50", "official"),
        ("dn_deformable_encoder_only_r50", "official"),
        ("dab_deformable_detr_r50_two_stage", "detrex"),
    ],
)
def test_the_round_trip_over_files_is_exact(tmp_path, name, layout):
    source = tiny_model(name)
    save_run(tmp_path / "run", source)
    theirs, back = tmp_path / "theirs.pth", tmp_path / "back"
    convert_checkpoint(tiny_model(name, seed=1), tmp_path / "run", theirs, to=layout)
    assert set(torch.load(theirs, weights_only=True)) == {"model"}
    report = convert_checkpoint(tiny_model(name, seed=2), theirs, back)
    assert report.layout == layout
    model = tiny_model(name, seed=3)
    load_model_weights(model, back)
    assert_same_state(model, source)
    assert read_manifest(back).class_names == list(COCO_NAMES)


def test_a_file_of_theirs_survives_the_round_trip_to_the_bit(tmp_path):
    state = to_layout(tiny_model("dn_detr_r50", num_classes=91).state_dict(), "official")
    torch.save({"model": state, "epoch": 49}, tmp_path / "theirs.pth")
    model = tiny_model("dn_detr_r50", num_classes=91, seed=1)
    convert_checkpoint(model, tmp_path / "theirs.pth", tmp_path / "ours")
    convert_checkpoint(model, tmp_path / "ours", tmp_path / "back.pth", to="official")
    back = read_weights(tmp_path / "back.pth")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert read_manifest(tmp_path / "ours").class_names == []


def test_class_names_of_our_checkpoint_are_kept(tmp_path):
    model = tiny_model("dab_detr_r50", num_classes=2)
    save_run(tmp_path / "run", model, class_names=["dog", "cat"])
    convert_checkpoint(model, tmp_path / "run", tmp_path / "out", config="a: 1\n")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.class_names == ["dog", "cat"] and manifest.config == "a: 1\n"


def test_an_ema_can_be_converted(tmp_path):
    source, averaged = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    content = {
        "model": to_layout(source.state_dict(), "detrex"),
        "ema_state": to_layout(averaged.state_dict(), "detrex"),
        "trainer": {"iteration": 9},
        "iteration": 9,
    }
    torch.save(content, tmp_path / "f.pth")
    model = tiny_model("dab_detr_r50", seed=2)
    report = convert_checkpoint(model, tmp_path / "f.pth", tmp_path / "out", ema=True)
    assert_same_state(model, averaged)
    assert "the EMA (ema_state) was taken" in report.notes[0]


def test_a_dilated_backbone_has_the_names_that_detrex_gives_it(tmp_path):
    model = tiny_model("dab_detr_r50")
    model.backbone.out_strides = [16]
    save_run(tmp_path / "run", model)
    convert_checkpoint(model, tmp_path / "run", tmp_path / "f.pth", to="detrex")
    assert "backbone.body.conv1.weight" in read_weights(tmp_path / "f.pth")


def test_an_output_that_exists_is_replaced_on_demand_alone(tmp_path):
    model = tiny_model("dab_detr_r50")
    save_run(tmp_path / "run", model)
    for output, to in ((tmp_path / "out", "dn_detr"), (tmp_path / "out.pth", "official")):
        convert_checkpoint(model, tmp_path / "run", output, to=to)
        with pytest.raises(CheckpointError, match=r"exists; .*--force"):
            convert_checkpoint(model, tmp_path / "run", output, to=to)
        convert_checkpoint(model, tmp_path / "run", output, to=to, force=True)
        read_weights(output)
        with pytest.raises(CheckpointError, match="is the input"):
            convert_checkpoint(model, output, output, to=to, force=True)
        read_weights(output)


def test_nothing_but_a_checkpoint_is_ever_replaced(tmp_path):
    model = tiny_model("dab_detr_r50")
    save_run(tmp_path / "run", model)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    for to in ("dn_detr", "official"):
        with pytest.raises(CheckpointError, match="photos"):
            convert_checkpoint(model, tmp_path / "run", tmp_path / "photos", to=to, force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"
    with pytest.raises(CheckpointError, match="in the way"):
        save_weights(tmp_path / "photos", {})


def test_a_failed_conversion_leaves_nothing_behind(tmp_path):
    save_run(tmp_path / "run", tiny_model("dab_detr_r50", num_classes=2))
    before = sorted(tmp_path.iterdir())
    for to in ("dn_detr", "detrex"):
        with pytest.raises(CheckpointError, match=r"the file has 2 classes .*, the model 80"):
            convert_checkpoint(
                tiny_model("dab_detr_r50"), tmp_path / "run", tmp_path / "out", to=to
            )
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_without_a_place_in_the_layout_is_an_error():
    state = {**tiny_model("dab_detr_r50").state_dict(), "mask_head.weight": torch.zeros(1)}
    for layout in ("official", "detrex"):
        with pytest.raises(CheckpointError, match=rf"mask_head.weight has no place in .*{layout}"):
            to_layout(state, layout)


def test_a_layout_that_the_model_does_not_know_is_an_error(tmp_path):
    model = tiny_model("dab_detr_r50")
    with pytest.raises(CheckpointError, match="choose from dn_detr, official, detrex"):
        convert_checkpoint(model, tmp_path / "f.pth", tmp_path / "out", to="mmdetection")


def test_converted_weights_cannot_be_resumed(tmp_path):
    folder = save_weights(tmp_path / "out", tiny_model("dab_detr_r50").state_dict())
    with pytest.raises(CheckpointError, match=r"weights alone.*train\.init_checkpoint"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"itself a checkpoint.*train\.init_checkpoint"):
        last_checkpoint(folder)
