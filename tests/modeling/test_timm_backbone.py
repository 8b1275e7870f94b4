"""timm's networks as backbones: shapes, padding, stages, weights."""

from __future__ import annotations

import copy
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dn_detr.modeling import TimmBackbone
from dn_detr.structures import pad_images
from tests.engine.runs import run_python

timm = pytest.importorskip("timm")

SWIN = "swin_tiny_patch4_window7_224"
SMALL = {
    SWIN: dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6)),
    "swin_small_patch4_window7_224": dict(
        embed_dim=24, depths=(1, 1, 3, 1), num_heads=(1, 2, 3, 6)
    ),
    "convnext_tiny": dict(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    "resnet50": dict(layers=(1, 1, 1, 1)),
    "efficientnet_b0": {},
    "regnety_004": {},
}


def build(name: str, **options) -> TimmBackbone:
    """A small network, whose every parameter and statistic takes part in the features."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **{"arguments": SMALL.get(name), **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator) - 0.5
                value.copy_(1 + noise if key.endswith(("weight", "var", "gamma")) else noise)
            elif key.endswith("relative_position_bias_table"):
                value.normal_(generator=generator)
    return backbone.eval()


def no_padding(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = [(3, 75, 110), (3, 133, 90)]
    return pad_images([torch.randn(size, generator=generator) for size in sizes])


@pytest.mark.parametrize("name", SMALL)
def test_maps_have_the_promised_shapes_for_any_size(name, batch):
    backbone = build(name)
    for stride, channels, features in zip(
        backbone.out_strides, backbone.out_channels, backbone(*batch), strict=True
    ):
        assert features.shape == (2, channels, -(-133 // stride), -(-110 // stride))
    assert backbone.out_strides == [8, 16, 32]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("out_indices", [[-3], [-3, -1]])
def test_every_trained_parameter_gets_a_gradient(name, out_indices, batch):
    backbone = build(name, out_indices=out_indices, output_norm=True).train()
    torch.stack([features.square().mean() for features in backbone(*batch)]).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "absent"),
    [(SWIN, "layers_2"), ("resnet50", "layer3"), ("regnety_004", "s3")],
)
def test_stages_beyond_the_last_returned_one_do_not_exist(name, absent):
    backbone = build(name, out_indices=[-3])
    assert not [key for key in backbone.state_dict() if key.startswith(f"body.{absent}")]


@pytest.mark.parametrize(
    ("size", "width"), [("tiny", 96), ("small", 96), ("base", 128), ("large", 192)]
)
def test_swin_channels_and_strides(size, width):
    with torch.device("meta"):
        backbone = TimmBackbone(f"swin_{size}_patch4_window7_224", out_indices=[0, 1, 2, 3])
    assert backbone.out_channels == [width, 2 * width, 4 * width, 8 * width]
    assert backbone.out_strides == [4, 8, 16, 32]


def test_swin_agrees_with_the_transformers_library():
    """With images whose maps the windows tile: timm pads other maps differently."""
    transformers = pytest.importorskip("transformers")
    arguments = dict(SMALL[SWIN], always_partition=True)
    ours = build(SWIN, out_indices=[0, 1, 2, 3], output_norm=True, arguments=arguments)
    config = transformers.SwinConfig(
        image_size=448,
        embed_dim=24,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 3, 6],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    theirs = transformers.SwinBackbone(config).eval()
    state = ours.state_dict()
    theirs.load_state_dict({key: _find(key, state) for key in theirs.state_dict()})
    images = torch.randn(1, 3, 448, 448)
    for a, b in zip(ours(images, no_padding(images)), theirs(images).feature_maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def _find(key: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of ours that transformers' Swin has under `key`."""
    parts = key.split(".")
    tail = parts[-1]
    if parts[0] == "hidden_states_norms":
        return state[f"norms.{int(parts[1][-1]) - 1}.{tail}"]
    if parts[1] == "layernorm":  # of the classifier, has no part in the maps
        return state[f"norms.3.{tail}"]
    if parts[1] == "embeddings":
        return state[f"body.patch_embed.{'norm' if 'norm' in parts else 'proj'}.{tail}"]
    stage = int(parts[3])
    if parts[4] == "downsample":
        return state[f"body.layers_{stage + 1}.downsample.{parts[5]}.{tail}"]
    block = f"body.layers_{stage}.blocks.{parts[5]}"
    if tail == "relative_position_bias_table":
        return state[f"{block}.attn.{tail}"]
    if parts[7] in ("q_proj", "k_proj", "v_proj"):
        return state[f"{block}.attn.qkv.{tail}"].chunk(3)["qkv".index(parts[7][0])]
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention": "attn.proj"}
    return state[f"{block}.{names.get(parts[6]) or f'mlp.{parts[7]}'}.{tail}"]


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "regnety_004"])
def test_features_are_timms(name):
    backbone = build(name)
    theirs = timm.create_model(name, features_only=True, **SMALL[name]).eval()
    body = backbone.body.state_dict()
    theirs.load_state_dict(theirs.state_dict() | body)
    images = torch.randn(1, 3, 64, 96)
    for a, b in zip(backbone(images, no_padding(images)), theirs(images)[-3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "frozen", "first_trained"),
    [
        (SWIN, 0, "body.patch_embed"),
        (SWIN, 1, "body.layers_0"),
        (SWIN, 2, "body.layers_1"),
        ("convnext_tiny", 2, "body.stages_1"),
        ("resnet50", 1, "body.layer1"),
        ("resnet50", 2, "body.layer2"),
        ("efficientnet_b0", 2, "body.blocks.2"),
        ("regnety_004", 2, "body.s2"),
        ("regnety_004", 5, None),
    ],
)
def test_frozen_stages_do_not_train(name, frozen, first_trained):
    backbone = build(name, frozen_stages=frozen)
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert trained[0].startswith(first_trained) if first_trained else not trained


def test_frozen_batch_norm_is_no_parameter():
    names = [name for name, _ in build("resnet50").named_parameters()]
    assert not [name for name in names if ".bn" in name]


def test_trainable_batch_norm_trains():
    names = [name for name, _ in build("resnet50", batch_norm="trainable").named_parameters()]
    assert [name for name in names if ".bn" in name]


def test_output_norm_normalises_the_channels():
    backbone = TimmBackbone("resnet18", output_norm=True, out_indices=[2]).eval()
    images = torch.randn(1, 3, 64, 64)
    (features,) = backbone(images, no_padding(images))
    torch.testing.assert_close(features.mean(1), torch.zeros(1, 8, 8), rtol=0, atol=1e-5)


def test_copy_works_on_its_own(batch):
    backbone = build(SWIN)
    torch.testing.assert_close(copy.deepcopy(backbone)(*batch)[0], backbone(*batch)[0])


def test_exported_network_takes_other_sizes(batch):
    backbone = build("resnet50")
    height, width = (32 * torch.export.Dim(side, min=2, max=40) for side in "hw")
    images = torch.randn(2, 3, 96, 128)
    shapes = ({2: height, 3: width}, {1: height, 2: width})
    exported = torch.export.export(backbone, (images, no_padding(images)), dynamic_shapes=shapes)
    images, mask = batch
    pad = (0, 18, 0, 27)
    images, mask = F.pad(images, pad), F.pad(mask, pad, value=True)
    for a, b in zip(exported.module()(images, mask), backbone(images, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiler_finds_one_graph(batch):
    backbone = build(SWIN)
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch)[-1], backbone(*batch)[-1])


def test_weights_in_a_file_give_timms_features(tmp_path):
    torch.manual_seed(3)
    published = timm.create_model(SWIN, **SMALL[SWIN])
    torch.save({"model": published.state_dict()}, tmp_path / "swin.pth")
    backbone = TimmBackbone(SWIN, weights=str(tmp_path / "swin.pth"), arguments=SMALL[SWIN])
    assert backbone.load_pretrained()
    torch.testing.assert_close(
        backbone.body.layers_3.downsample.reduction.weight,
        published.layers[3].downsample.reduction.weight,
    )


def test_weights_of_the_original_authors_are_renamed(tmp_path):
    """Microsoft's files keep the downsampling of a stage at the end of the one before."""
    published = timm.create_model(SWIN, **SMALL[SWIN]).state_dict()
    original = {}
    for key, value in published.items():
        for i in (1, 2, 3):
            key = key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample")
        original[key.replace("head.fc.", "head.")] = value
    torch.save({"model": original}, tmp_path / "swin.pth")
    backbone = TimmBackbone(SWIN, weights=str(tmp_path / "swin.pth"), arguments=SMALL[SWIN])
    backbone.load_pretrained()
    torch.testing.assert_close(
        backbone.body.layers_1.downsample.reduction.weight,
        published["layers.1.downsample.reduction.weight"],
    )


def test_weights_without_a_classifier_are_enough(tmp_path):
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    backbone = TimmBackbone("resnet18", weights=str(tmp_path / "resnet18.pth"))
    assert backbone.load_pretrained()
    torch.testing.assert_close(backbone.body.bn1.weight, state["bn1.weight"])


@pytest.mark.parametrize("other", ["resnet18", "resnet26", "resnet50"])
def test_weights_of_another_architecture_are_refused(tmp_path, other):
    torch.save(timm.create_model(other).state_dict(), tmp_path / "other.pth")
    backbone = TimmBackbone("resnet34", weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"other\.pth.*do not fit resnet34"):
        backbone.load_pretrained()


def test_half_a_backbone_is_refused(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    half = {key: value for key, value in state.items() if not key.startswith("layer3")}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"(?s)half\.pth.*layer3"):
        TimmBackbone("resnet18", weights=str(tmp_path / "half.pth")).load_pretrained()


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"model": _Payload(tmp_path / "executed")}, tmp_path / "evil.pth")
    backbone = TimmBackbone("resnet18", weights=str(tmp_path / "evil.pth"))
    with pytest.raises(ValueError, match=r"evil\.pth.*could run code"):
        backbone.load_pretrained()
    assert not (tmp_path / "executed").exists()


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.pth.*no such file.*pretrained"):
        TimmBackbone("resnet18", weights="nowhere.pth").load_pretrained()


def test_weights_out_of_reach_are_a_loud_warning(monkeypatch, tmp_path, caplog):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = TimmBackbone("resnet18.a1_in1k", weights="pretrained")
    assert not backbone.load_pretrained()
    assert "RANDOM WEIGHTS" in caplog.text and "resnet18.a1_in1k" in caplog.text


def test_downloaded_weights_are_loaded_and_their_normalisation_compared(monkeypatch, caplog):
    published = timm.create_model("mobilenetv3_small_050", num_classes=1000).state_dict()
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(published)
    )
    overlay = dict(timm.get_pretrained_cfg("mobilenetv3_small_050").to_dict(), mean=(0.5,) * 3)
    monkeypatch.setattr(
        timm.models._builder,
        "get_pretrained_cfg",
        lambda *_, **__: timm.models.PretrainedCfg(**overlay),
    )
    backbone = TimmBackbone("mobilenetv3_small_050", weights="pretrained")
    with caplog.at_level(logging.WARNING):
        assert backbone.load_pretrained()
    torch.testing.assert_close(backbone.body.conv_stem.weight, published["conv_stem.weight"])
    assert "model.pixel_mean=[127.5, 127.5, 127.5]" in caplog.text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "swin_tiny"}, r"no network 'swin_tiny'; did you mean"),
        ({"name": "hf-hub:somebody/something"}, "no network"),
        ({"name": "resnet18.no_such_tag"}, "no_such_tag"),
        ({"out_indices": [5]}, r"out_indices=\[5\]"),
        ({"out_indices": []}, "finest first"),
        ({"out_indices": [3, 2]}, "finest first"),
        ({"name": "vit_tiny_patch16_224"}, "strides grow"),
        ({"name": "mixer_s32_224", "out_indices": [-1]}, "does not take the arguments"),
        ({"batch_norm": "sync"}, "sync"),
        ({"frozen_stages": -1}, "frozen_stages -1"),
        ({"frozen_stages": 6}, "frozen_stages 6: choose from 0 to 5"),
        ({"name": "hrnet_w18_small"}, "only 0 is possible"),
        ({"arguments": {"depths": 3}}, "depths"),
        ({"arguments": {"checkpoint_path": "x.pth"}}, "checkpoint_path"),
        ({"arguments": {"pretrained_cfg": {}}}, "pretrained_cfg"),
    ],
)
def test_unknown_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        TimmBackbone(**{"name": "resnet18", **options})


def test_maps_that_are_no_whole_fraction_of_the_image_are_refused(batch):
    backbone = TimmBackbone("inception_v3", frozen_stages=0)
    with pytest.raises(ValueError, match=r"a map of stride 8 has \d+ x \d+ cells for an image of"):
        backbone(*batch)


def test_stages_after_the_last_returned_one_do_not_train():
    backbone = TimmBackbone("efficientnet_b0", out_indices=[-3], frozen_stages=0)
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert trained[0].startswith("body.conv_stem") and trained[-1].startswith("body.blocks.2")


def test_missing_timm_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install timm"):
        TimmBackbone("resnet18")


def test_the_library_does_not_import_timm():
    code = "import sys, dn_detr.modeling; sys.exit('timm' in sys.modules)"
    assert run_python(code).returncode == 0
