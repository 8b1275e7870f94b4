"""Files of Hugging Face transformers, under the names of any of its versions."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import (
    CheckpointError,
    HuggingFaceLayout,
    load_model_weights,
    load_tensors,
)
from dn_detr.checkpoint.layouts.family import Traits
from dn_detr.checkpoint.layouts.layout import Renaming
from tests.checkpoint.tiny_models import assert_same_state, tiny_model

ENCODER, DECODER = "transformer.encoder.layers.1.", "transformer.decoder.layers.0."
DENSE = [  # (a name that a version of transformers writes, ours)
    ("model.backbone.conv_encoder.model._backbone.conv1.weight", "backbone.body.conv1.weight"),
    ("model.backbone.conv_encoder.model.layer1.0.bn1.bias", "backbone.body.layer1.0.bn1.bias"),
    ("backbone.model.layer1.0.downsample.0.weight", "backbone.body.layer1.0.downsample.0.weight"),
    (
        "model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var",
        "backbone.body.bn1.running_var",
    ),
    (
        "model.backbone.conv_encoder.model.encoder.stages.1.layers.2.layer.0.convolution.weight",
        "backbone.body.layer2.2.conv1.weight",
    ),
    (
        "model.backbone.conv_encoder.model.encoder.stages.0.layers.0.shortcut.normalization.bias",
        "backbone.body.layer1.0.downsample.1.bias",
    ),
    ("model.input_projection.bias", "neck.convs.0.bias"),
    ("model.query_refpoint_embeddings.weight", "queries.anchors.weight"),
    ("model.patterns.weight", "queries.patterns.weight"),
    ("model.encoder.layers.1.self_attn.o_proj.bias", ENCODER + "self_attn.out_proj.bias"),
    ("model.encoder.layers.1.mlp.fc1.weight", ENCODER + "ffn.linear1.weight"),
    ("model.encoder.layers.1.fc2.weight", ENCODER + "ffn.linear2.weight"),
    ("model.encoder.layers.1.activation_fn.weight", ENCODER + "ffn.activation.weight"),
    ("model.encoder.layers.1.final_layer_norm.weight", ENCODER + "ffn.norm.weight"),
    (
        "model.decoder.layers.0.self_attn.self_attn_query_content_proj.weight",
        DECODER + "self_attn.query_content_proj.weight",
    ),
    (
        "model.decoder.layers.0.layer.0.self_attn_query_content_proj.weight",
        DECODER + "self_attn.query_content_proj.weight",
    ),
    (
        "model.decoder.layers.0.layer.0.self_attn.output_proj.weight",
        DECODER + "self_attn.out_proj.weight",
    ),
    ("model.decoder.layers.0.layer.0.self_attn_layer_norm.bias", DECODER + "self_norm.bias"),
    (
        "model.decoder.layers.0.cross_attn.cross_attn.output_proj.weight",
        DECODER + "cross_attn.out_proj.weight",
    ),
    (
        "model.decoder.layers.0.layer.1.cross_attn_query_pos_sine_proj.bias",
        DECODER + "cross_attn.query_pos_sine_proj.bias",
    ),
    (
        "model.decoder.layers.0.cross_attn.cross_attn_layer_norm.weight",
        DECODER + "cross_norm.weight",
    ),
    ("model.decoder.layers.0.layer.2.fc1.bias", DECODER + "ffn.linear1.bias"),
    ("model.decoder.layers.0.mlp.activation_fn.weight", DECODER + "ffn.activation.weight"),
    ("model.decoder.layernorm.weight", "transformer.decoder.norm.weight"),
    ("class_embed.weight", "heads.class_embed.0.weight"),
    ("bbox_predictor.layers.2.bias", "heads.bbox_embed.0.layers.2.bias"),
]
DEFORMABLE = [
    ("model.backbone.model.bn1.weight", "backbone.body.bn1.weight"),
    ("model.input_proj.3.1.bias", "neck.norms.3.bias"),
    ("model.level_embed", "transformer.level_embed"),
    ("model.tgt_embed.weight", "queries.content.weight"),
    (
        "model.encoder.layers.1.self_attn.sampling_offsets.bias",
        ENCODER + "self_attn.sampling_offsets.bias",
    ),
    ("model.decoder.layers.0.self_attn.o_proj.weight", DECODER + "self_attn.out_proj.weight"),
    ("model.decoder.layers.0.encoder_attn.value_proj.bias", DECODER + "cross_attn.value_proj.bias"),
    ("model.decoder.layers.0.encoder_attn_layer_norm.bias", DECODER + "cross_norm.bias"),
    ("model.decoder.layers.0.self_attn_layer_norm.bias", DECODER + "self_norm.bias"),
    ("model.decoder.layers.0.mlp.fc1.bias", DECODER + "ffn.linear1.bias"),
    ("model.decoder.layers.0.final_layer_norm.bias", DECODER + "ffn.norm.bias"),
    ("class_embed.1.bias", "heads.class_embed.1.bias"),
]


@pytest.mark.parametrize(("dense", "pairs"), [(True, DENSE), (False, DEFORMABLE)])
def test_names_of_all_versions_have_one_name_of_ours(dense, pairs):
    traits = Traits(
        dense_decoder=dense, deformable_encoder=not dense, two_stage=False, num_layers=6
    )
    layout = HuggingFaceLayout()
    to_ours = Renaming((their, our) for our, their in layout.pairs_of(traits))
    assert [to_ours(layout.first_name(name)) for name, _ in pairs] == [our for _, our in pairs]


def dab_detr(seed, **options):
    transformers = pytest.importorskip("transformers", reason="the independent oracle")
    torch.manual_seed(seed)
    backbone = transformers.ResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        embedding_size=64,
        layer_type="basic",
        out_features=["stage4"],
    )
    settings = dict(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        hidden_size=32,
        num_queries=7,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_labels=91,
    )
    config = transformers.DabDetrConfig(**{**settings, **options})
    return transformers.DabDetrForObjectDetection(config)


def test_dab_detr_of_transformers_loads_from_its_state_and_its_folder(tmp_path):
    theirs = dab_detr(0, num_patterns=3)
    first = tiny_model("dab_detr_r50", num_classes=91, num_patterns=3)
    second = tiny_model("dab_detr_r50", num_classes=91, num_patterns=3, seed=1)
    report = load_tensors(first, theirs.state_dict())
    assert report.layout == "huggingface" and report.fresh == ()
    theirs.save_pretrained(tmp_path)
    load_model_weights(second, tmp_path)
    assert_same_state(first, second)
    packed = first.state_dict()["transformer.encoder.layers.0.self_attn.in_proj_weight"]
    attention = theirs.model.encoder.layers[0].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert torch.equal(packed, torch.cat([p.weight for p in projections]))


def test_labels_of_the_folder_decide_on_the_rows(tmp_path):
    theirs = dab_detr(0, num_labels=3, id2label={0: "cat", 1: "N/A", 2: "dog"})
    theirs.save_pretrained(tmp_path)
    model = tiny_model("dab_detr_r50", num_classes=2)
    report = load_model_weights(model, tmp_path, class_names=["dog", "bird"], fine_tune=True)
    assert report.mapped_classes == ("dog",)
    assert torch.equal(model.heads.class_embed[0].weight[0], theirs.class_embed.weight[2])


def test_second_names_of_transformers_may_not_disagree():
    state = dict(dab_detr(0).state_dict())
    state["bbox_predictor.layers.0.bias"] = state["bbox_predictor.layers.0.bias"] + 1
    with pytest.raises(CheckpointError, match="two names of one tensor, but they disagree"):
        load_tensors(tiny_model("dab_detr_r50", num_classes=91), state)


def stored_as_transformers(model):
    """A model of ours in DeformableDetr's layout, with query, key and value apart."""
    result = {}
    for their, value in HuggingFaceLayout().to_theirs(model.state_dict()).items():
        their = their.replace("backbone.body.", "backbone.conv_encoder.model._backbone.")
        their = their if their.startswith(("class_embed", "bbox_embed")) else f"model.{their}"
        if "in_proj_" in their:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[their.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            result[their] = value
    return result


@pytest.mark.parametrize(
    "name",
    [
        "dab_deformable_detr_r50",
        "dab_deformable_detr_r50_two_stage",
        "dn_deformable_detr_r50",
        "dab_detr_r50",
    ],
)
def test_a_model_of_ours_in_the_layout_of_transformers_loads(name):
    source, model = tiny_model(name), tiny_model(name, seed=1)
    assert load_tensors(model, stored_as_transformers(source)).layout == "huggingface"
    assert_same_state(model, source)


def test_a_projection_without_its_siblings_is_unexpected():
    source, model = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    state = stored_as_transformers(source)
    del state["model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"in_proj_weight \([\s\S]*layers\.0\.self_attn\.q_"):
        load_tensors(model, state)


def test_plain_deformable_detr_is_refused():
    transformers = pytest.importorskip("transformers", reason="the independent oracle")
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
        ),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
    )
    state = transformers.DeformableDetrForObjectDetection(config).state_dict()
    with pytest.raises(CheckpointError, match=r"another model \(huggingface layout\)"):
        load_tensors(tiny_model("dab_deformable_detr_r50"), state)
