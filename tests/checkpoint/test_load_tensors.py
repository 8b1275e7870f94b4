"""Weights of every layout into every architecture, and one error for what does not fit."""

from __future__ import annotations

import re

import pytest
import torch

from dn_detr.checkpoint import (
    CheckpointError,
    Snapshot,
    load_model_weights,
    load_tensors,
)
from dn_detr.checkpoint.coco_classes import COCO_IDS, COCO_NAMES
from dn_detr.modeling.backbones import ResNet
from tests.checkpoint.layouts import to_layout
from tests.checkpoint.tiny_models import ARCHITECTURES, assert_same_state, tiny_model
from tests.checkpoint.writing import save

HEAD = "heads.class_embed.0.weight"


# What the other code base has, too.
EXCHANGES = [
    (name, layout)
    for name in ARCHITECTURES
    for layout in ("official", "detrex")
    if (name, layout)
    not in {
        ("dab_deformable_detr_r50_two_stage", "official"),
        ("dn_deformable_encoder_only_r50", "detrex"),
    }
]


@pytest.mark.parametrize(("name", "layout"), EXCHANGES)
def test_the_way_through_another_layout_is_exact(name, layout):
    source, model = tiny_model(name), tiny_model(name, seed=1)
    state = to_layout(source.state_dict(), layout)
    report = load_tensors(model, state)
    assert_same_state(model, source)
    assert report.layout == layout and report.fresh == ()


@pytest.mark.parametrize("layout", ["official", "detrex"])
def test_ninety_one_classes_stay_ninety_one(layout):
    source = tiny_model("dn_detr_r50", num_classes=91)
    model = tiny_model("dn_detr_r50", num_classes=91, seed=1)
    state = to_layout(source.state_dict(), layout)
    assert len(state["class_embed.bias"]) == 91
    assert load_tensors(model, state).mapped_classes == ()
    assert_same_state(model, source)


def test_the_official_layout_has_a_row_per_category_id_that_is_never_detected_if_unused():
    source = tiny_model("dn_deformable_detr_r50")
    state = to_layout(source.state_dict(), "official")
    unused = [row for row in range(91) if row not in COCO_IDS]
    bias = state["class_embed.1.bias"]
    assert bias.shape == (91,) and bool((bias[unused] == -100).all())
    assert not state["class_embed.1.weight"][unused].any()
    table = state["label_enc.weight"]
    assert table.shape == (92, 31) and not table[unused].any()
    assert torch.equal(table[-1], source.state_dict()["denoising.embed.label_embed.weight"][-1])


def test_dense_models_take_their_content_from_the_last_label_row():
    source = tiny_model("dn_detr_r50").state_dict()
    table = to_layout(source, "detrex")["denoising_generator.label_encoder.weight"]
    assert torch.equal(table[:-1], source["denoising.embed.label_embed.weight"])
    assert torch.equal(table[-1:], source["queries.content.weight"])


def test_patterns_and_dilated_backbones_have_their_published_names():
    source = tiny_model("dab_detr_r50", num_patterns=3)
    source.backbone.out_strides = [16]  # as a dilated backbone has it; tensors are the same
    state = to_layout(source.state_dict(), "detrex", model=source)
    assert state["transformer.patterns.weight"].shape == (3, 32)
    assert "backbone.body.layer4.0.conv1.weight" in state
    model = tiny_model("dab_detr_r50", num_patterns=3, seed=1)
    model.backbone.out_strides = [16]
    assert load_tensors(model, state).layout == "detrex"
    assert_same_state(model, source)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dn_detr_r50", "official"),
        ("dn_detr_r50", "detrex"),
        ("dab_deformable_detr_r50", "official"),
        ("dab_deformable_detr_r50_two_stage", "detrex"),
    ],
)
def test_second_names_may_be_absent_but_not_disagree(name, layout):
    source, model = tiny_model(name), tiny_model(name, seed=1)
    state = to_layout(source.state_dict(), layout)
    second = [k for k in state if k.startswith("transformer.decoder.bbox_embed.")]
    second += [k for k in state if k.startswith("transformer.decoder.class_embed.")]
    second += [k for k in state if k.endswith(".ffns.0.activation.weight")]
    assert len(second) > 3
    load_tensors(model, {k: v for k, v in state.items() if k not in second})
    assert_same_state(model, source)
    first = {k.removeprefix("transformer.decoder.") for k in second}
    model = tiny_model(name, seed=1)
    load_tensors(model, {k: v for k, v in state.items() if k not in first})
    assert_same_state(model, source)
    for name_of_second in (second[0], second[-1]):
        value = state[name_of_second]
        next_number = torch.nextafter(value, torch.tensor(torch.inf))
        for other in (next_number, value.double()):  # by one bit, or in type
            with pytest.raises(CheckpointError, match="two names of one tensor, but they disagree"):
                load_tensors(model, {**state, name_of_second: other})


@pytest.mark.parametrize("table", ["label_encoder.weight", "label_enc.weight"])
@pytest.mark.parametrize("name", ["dn_detr_r50", "dn_deformable_detr_r50"])
def test_the_label_table_has_other_names_in_converted_files_of_detrex(name, table):
    source, model = tiny_model(name), tiny_model(name, seed=1)
    state = to_layout(source.state_dict(), "detrex")
    state[table] = state.pop("denoising_generator.label_encoder.weight")
    load_tensors(model, state)
    assert_same_state(model, source)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("layout", ["dn_detr", "official", "detrex"])
def test_the_prefix_of_a_wrapped_model_is_taken_off(layout, prefix):
    source, model = tiny_model("dn_detr_r50"), tiny_model("dn_detr_r50", seed=1)
    state = source.state_dict()
    state = state if layout == "dn_detr" else to_layout(state, layout)
    assert load_tensors(model, {prefix + k: v for k, v in state.items()}).layout == layout
    assert_same_state(model, source)


@pytest.mark.parametrize("layout", ["dn_detr", "official", "detrex"])
@pytest.mark.parametrize("name", ["dn_detr_r50", "dn_deformable_detr_r50"])
def test_without_denoising_its_table_is_dropped_with_a_note(name, layout):
    source, model = tiny_model(name), tiny_model(name, seed=1)
    model.denoising = None
    state = source.state_dict()
    state = state if layout == "dn_detr" else to_layout(state, layout)
    report = load_tensors(model, state)
    assert_same_state(model, source)
    assert any("no denoising" in note for note in report.notes)
    again = to_layout(model.state_dict(), "official")
    assert ("label_enc.weight" in again) == (name == "dn_detr_r50")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted_with_a_note(dtype):
    source, model = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    state = to_layout(source.to(dtype).state_dict(), "official")
    report = load_tensors(model, state)
    assert_same_state(model, source.float())
    assert any(f"{dtype} were converted to torch.float32" in note for note in report.notes)


def test_counters_and_classifiers_of_a_backbone_are_dropped():
    source, model = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    state = to_layout(source.state_dict(), "official")
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    state["backbone.0.body.fc.weight"] = torch.zeros(1000, 512)
    load_tensors(model, state)
    ours = {**source.state_dict(), "backbone.body.bn1.num_batches_tracked": torch.tensor(3)}
    load_tensors(model, ours)
    assert_same_state(model, source)


def test_fine_tuning_takes_the_rows_of_known_classes(tmp_path):
    source = tiny_model("dn_deformable_detr_r50", num_classes=91)
    model = tiny_model("dn_deformable_detr_r50", num_classes=3, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["dog", "digger", "person"]
    torch.save({"model": to_layout(source.state_dict(), "official")}, tmp_path / "f.pth")
    report = load_model_weights(model, tmp_path / "f.pth", class_names=names, fine_tune=True)
    assert report.mapped_classes == ("dog", "person") and report.fresh == ()
    file, found = source.state_dict(), model.state_dict()
    for name in model.class_tensors():
        assert torch.equal(found[name][[0, 2]], file[name][[18, 1]])
        assert torch.equal(found[name][1], before[name][1])
    table = "denoising.embed.label_embed.weight"
    assert torch.equal(found[table][3], file[table][91])
    assert torch.equal(found["neck.convs.0.weight"], file["neck.convs.0.weight"])


def test_classes_without_names_are_re_initialised_in_fine_tuning_alone(tmp_path):
    save(tmp_path, Snapshot(1, 0, tiny_model("dn_detr_r50", num_classes=5).state_dict()))
    model = tiny_model("dn_detr_r50", num_classes=3, seed=1)
    head = model.state_dict()[HEAD].clone()
    with pytest.raises(CheckpointError, match="the file has 5 classes without names, the model 3"):
        load_model_weights(model, tmp_path)
    report = load_model_weights(model, tmp_path, fine_tune=True)
    assert sorted(report.fresh) == sorted(model.class_tensors())
    assert torch.equal(model.state_dict()[HEAD], head)
    assert report.notes == (
        "the file has 5 classes without names, the model 3 classes without names: the "
        "classification head is re-initialised",
    )


def test_names_in_our_manifest_decide_on_the_rows(tmp_path):
    source = tiny_model("dab_detr_r50", num_classes=2)
    save(tmp_path, Snapshot(1, 0, source.state_dict()), class_names=["dog", "cat"])
    model = tiny_model("dab_detr_r50", num_classes=2, seed=1)
    report = load_model_weights(model, tmp_path, class_names=["cat", "dog"], fine_tune=True)
    assert report.mapped_classes == ("cat", "dog")
    assert torch.equal(model.state_dict()[HEAD], source.state_dict()[HEAD].flip(0))
    with pytest.raises(CheckpointError, match="class 0 was 'dog' and now is 'cat'"):
        load_model_weights(model, tmp_path, class_names=["cat", "dog"])
    assert load_model_weights(model, tmp_path, class_names=["dog", "cat"]).notes == ()


WRONG = {
    "another depth": ("dn_detr_r50", {"backbone": "resnet34"}, "official"),
    "dense into deformable": ("dn_detr_r50", {}, "detrex"),
    "ours into another": ("dab_detr_r50", {}, "dn_detr"),
    "two-stage": ("dab_deformable_detr_r50_two_stage", {}, "detrex"),
    "encoder only": ("dn_deformable_encoder_only_r50", {}, "official"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_architecture_is_refused_with_the_first_names(case):
    name, knobs, layout = WRONG[case]
    state = tiny_model(name, **knobs).state_dict()
    state = state if layout == "dn_detr" else to_layout(state, layout)
    target = "dn_detr_r50" if knobs else "dn_deformable_detr_r50"
    model = tiny_model(target, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_tensors(model, state, what="weights.pth")
    message = str(error.value)
    kind = "a larger" if case == "another depth" else "another"
    opening = rf"weights.pth: the weights of {kind} model \({layout} layout\): \d+ of the model's"
    assert re.match(opening, message), message
    assert re.search(r"\d+ (missing from|unexpected in) the file:\n  \w+", message)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_half_a_backbone_and_none_are_errors():
    model = tiny_model("dab_detr_r50")
    state = to_layout(model.state_dict(), "official")
    half = {k: v for k, v in state.items() if ".body.layer4." not in k}
    with pytest.raises(
        CheckpointError,
        match=r"incomplete \(official .*\n25 missing from the file:\n  backbone\.body\.la",
    ):
        load_tensors(model, half)
    none = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    for fine_tune in (False, True):
        with pytest.raises(CheckpointError, match="100 missing from the file"):
            load_tensors(model, none, fine_tune=fine_tune)


@pytest.mark.parametrize("layout", ["dn_detr", "official", "detrex"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(layout, value):
    model = tiny_model("dn_detr_r50")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["transformer.decoder.norm.weight"][:2] = value
    state["heads.bbox_embed.0.layers.2.weight"][0, 0] = value
    state = state if layout == "dn_detr" else to_layout(state, layout)
    with pytest.raises(CheckpointError) as error:
        load_tensors(model, state)
    assert "2 tensors hold weights that are NaN or infinite" in str(error.value)
    assert "transformer.decoder.norm.weight" in str(error.value)


def test_weights_whose_sum_overflows_are_numbers():
    model = tiny_model("dab_detr_r50")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["queries.anchors.weight"][:] = torch.finfo(torch.float32).max
    load_tensors(model, state)


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2", "float4_e2m1fn_x2", "complex64"])
def test_what_has_no_number_of_the_model_is_no_weight(dtype):
    model = tiny_model("dab_detr_r50")
    kind = getattr(torch, dtype)
    bytes_ = torch.zeros(7, 4 * kind.itemsize, dtype=torch.uint8)
    state = {**model.state_dict(), "queries.anchors.weight": bytes_.view(kind)}
    with pytest.raises(CheckpointError, match=rf"1 of another dtype:\n  queries.*{dtype}"):
        load_tensors(model, state)


def test_a_file_without_a_known_name_is_refused_with_the_door_for_its_key_map():
    model = tiny_model("dab_detr_r50")
    with pytest.raises(CheckpointError, match=r"0 of the model's .*(?s:.*)model\.key_maps"):
        load_tensors(model, {"bbox_head.cls_branches.0.weight": torch.zeros(2)})


def torchvision_state(model):
    """Of the model's backbone, with what a whole ResNet has besides."""
    body = {k.removeprefix("backbone.body."): v for k, v in model.state_dict().items()}
    body = {k: v for k, v in body.items() if k.startswith(("conv1", "bn1", "layer"))}
    return {**body, "fc.weight": torch.zeros(9, 512), "bn1.num_batches_tracked": torch.tensor(1)}


def detectron2_state(model):
    state = to_layout(model.state_dict(), "detrex")
    body = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return {**body, "stem.fc.weight": torch.zeros(9, 512)}


@pytest.mark.parametrize("make", [torchvision_state, detectron2_state])
def test_a_backbone_alone_starts_a_training_and_nothing_else(make):
    source, model = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    rest = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    with pytest.raises(CheckpointError, match=": a backbone alone"):
        load_tensors(model, make(source))
    report = load_tensors(model, make(source), fine_tune=True)
    assert report.layout == make.__name__.removesuffix("_state")
    assert set(report.fresh) == set(rest)
    assert report.notes[0].startswith("a backbone alone")
    for name, value in model.state_dict().items():
        assert torch.equal(value, rest.get(name, source.state_dict()[name])), name


def test_half_a_backbone_alone_is_an_error():
    model = tiny_model("dab_detr_r50")
    state = torchvision_state(tiny_model("dab_detr_r50", backbone="resnet34"))
    with pytest.raises(CheckpointError, match=r"unexpected in the file:\n  backbone\.body\.lay"):
        load_tensors(model, state, fine_tune=True)


def test_a_backbone_is_read_out_of_every_layout(tmp_path):
    model = tiny_model("dn_detr_r50")
    states = {
        "torchvision": torchvision_state(model),
        "detectron2": {"model": {k: v.numpy() for k, v in detectron2_state(model).items()}},
        "official": {"model": to_layout(model.state_dict(), "official")},
        "detrex": {"model": to_layout(model.state_dict(), "detrex")},
        "ours": model.state_dict(),
    }
    for name, state in states.items():
        file = tmp_path / f"{name}.pth"
        torch.save(state, file)
        backbone = ResNet("resnet18", weights=str(file))
        assert backbone.load_pretrained()
        for key, value in backbone.body.state_dict().items():
            assert torch.equal(value, model.backbone.body.state_dict()[key]), name


@pytest.mark.parametrize(
    "state",
    [
        {"query_embed.weight": torch.zeros(1)},
        {"blobs": {"conv1_w": torch.zeros(64, 3, 7, 7)}},  # Caffe2, which expects other images
    ],
)
def test_a_file_without_this_backbone_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match="another model"):
        ResNet("resnet18", weights=str(tmp_path / "f.pth")).load_pretrained()


def test_coco_names_of_a_published_file_meet_the_data():
    source, model = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    state = to_layout(source.state_dict(), "detrex")
    assert load_tensors(model, state, class_names=COCO_NAMES).notes == ()
    with pytest.raises(CheckpointError, match="class 0 was 'person' and now is 'toothbrush'"):
        load_tensors(model, state, class_names=COCO_NAMES[::-1])
    report = load_tensors(model, state, class_names=COCO_NAMES[::-1], fine_tune=True)
    assert report.mapped_classes == COCO_NAMES[::-1]
