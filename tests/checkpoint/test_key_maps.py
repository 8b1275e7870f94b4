"""The key maps against the names that the authors' code and detrex really have."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dn_detr.checkpoint.layouts.family import Traits
from dn_detr.checkpoint.layouts.layout import Renaming
from tests.checkpoint.layouts import LAYOUTS, to_layout

OFFICIAL = [
    "dn_dab_detr_r50",
    "dn_dab_deformable_detr_r50",
    "dn_dab_deformable_detr_deformable_encoder_only_r50_3pat",
]
DETREX = [
    "dn_detr_r50",
    "dab_detr_r50",
    "dn_deformable_detr_r50",
    "dab_deformable_detr_r50",
    "dab_deformable_detr_r50_two_stage",
]
PUBLISHED = [("official", name) for name in OFFICIAL] + [("detrex", name) for name in DETREX]


def schema(shared, layout, name):
    """Name -> shape of every entry of the published state_dict."""
    file = np.load(shared / "golden" / layout / f"{layout}_{name}.npz")
    if layout == "official":
        entries = json.loads(str(file["state_schema"]))
        return {key: tuple(entry[0]) for key, entry in entries.items()}
    entries = json.loads(file["meta_json"].tobytes())["state_dict"]
    return {key: tuple(shape) for key, shape, _ in entries}


@pytest.fixture(params=PUBLISHED, ids=lambda case: "-".join(case))
def published(request, shared):
    """Layout, and a state_dict that differs in every tensor except in aliases."""
    layout, name = request.param
    shapes = schema(shared, layout, name)
    values: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        first = key.replace("transformer.decoder.bbox_embed.", "bbox_embed.")
        first = first.replace("transformer.decoder.class_embed.", "class_embed.")
        first = first.replace(".ffns.0.activation.", ".ffns.0.layers.0.1.")
        if first not in values:
            values[first] = torch.full((1,), float(len(values))).expand(shape)
        values[key] = values[first]
    return layout, {key: values[key] for key in shapes}


def test_every_published_name_has_one_name_of_ours(published):
    layout, state = published
    translation = LAYOUTS[layout].to_ours(state)
    assert translation.unknown == [] and translation.conflicts == []


def test_there_and_back_is_the_identity(published):
    layout, state = published
    back = to_layout(LAYOUTS[layout].to_ours(state).tensors, layout)
    if layout == "detrex":
        # The 80 classes of a model of ours are detrex's; nothing grows or shrinks.
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value), name


def test_our_names_survive_the_other_layout(published):
    layout, state = published
    ours = LAYOUTS[layout].to_ours(state).tensors
    if len(state.get("class_embed.bias", state.get("class_embed.0.bias"))) == 80:
        return  # the official layout counts COCO's 80 classes by category id
    encoder_only = "transformer.decoder.layers.0.cross_attn.level_attn.weight" in ours
    for other in ("official",) if encoder_only else ("official", "detrex"):
        there = LAYOUTS[other].to_ours(to_layout(ours, other))
        assert there.unknown == []
        assert there.tensors.keys() == ours.keys()
        for name, value in ours.items():
            assert torch.equal(there.tensors[name], value), name


DENSE = Traits(dense_decoder=True, deformable_encoder=False, two_stage=False, num_layers=6)
DEFORMABLE = Traits(dense_decoder=False, deformable_encoder=True, two_stage=False, num_layers=6)
ENCODER_ONLY = Traits(dense_decoder=True, deformable_encoder=True, two_stage=False, num_layers=6)
TWO_STAGE = Traits(dense_decoder=False, deformable_encoder=True, two_stage=True, num_layers=6)
DECODER = "transformer.decoder.layers.2."
MEANING = [  # (traits, ours, official, detrex): what a bijection alone could confuse
    (DENSE, "self_norm.bias", "norm1.bias", "norms.0.bias"),
    (DENSE, "cross_norm.bias", "norm2.bias", "norms.1.bias"),
    (DENSE, "ffn.norm.bias", "norm3.bias", "norms.2.bias"),
    (DENSE, "ffn.linear1.bias", "linear1.bias", "ffns.0.layers.0.0.bias"),
    (DENSE, "ffn.linear2.bias", "linear2.bias", "ffns.0.layers.1.bias"),
    (DENSE, "ffn.activation.weight", "activation.weight", "ffns.0.layers.0.1.weight"),
    (
        DENSE,
        "self_attn.query_content_proj.bias",
        "sa_qcontent_proj.bias",
        "attentions.0.query_content_proj.bias",
    ),
    (DENSE, "self_attn.key_pos_proj.bias", "sa_kpos_proj.bias", "attentions.0.key_pos_proj.bias"),
    (DENSE, "self_attn.out_proj.bias", "self_attn.out_proj.bias", "attentions.0.out_proj.bias"),
    (
        DENSE,
        "cross_attn.query_pos_sine_proj.bias",
        "ca_qpos_sine_proj.bias",
        "attentions.1.query_pos_sine_proj.bias",
    ),
    (
        DENSE,
        "cross_attn.query_pos_proj.bias",
        "ca_qpos_proj.bias",
        "attentions.1.query_pos_proj.bias",
    ),
    (DENSE, "cross_attn.value_proj.bias", "ca_v_proj.bias", "attentions.1.value_proj.bias"),
    (DENSE, "cross_attn.out_proj.bias", "cross_attn.out_proj.bias", "attentions.1.out_proj.bias"),
    (DEFORMABLE, "self_norm.bias", "norm2.bias", "norms.0.bias"),
    (DEFORMABLE, "cross_norm.bias", "norm1.bias", "norms.1.bias"),
    (DEFORMABLE, "ffn.norm.bias", "norm3.bias", "norms.2.bias"),
    (
        DEFORMABLE,
        "self_attn.in_proj_weight",
        "self_attn.in_proj_weight",
        "attentions.0.attn.in_proj_weight",
    ),
    (
        DEFORMABLE,
        "cross_attn.value_proj.bias",
        "cross_attn.value_proj.bias",
        "attentions.1.value_proj.bias",
    ),
    (ENCODER_ONLY, "self_norm.bias", "norm1.bias", "norms.0.bias"),
    (ENCODER_ONLY, "cross_attn.out_proj.bias", "ca_out_v_proj.bias", None),
    (ENCODER_ONLY, "cross_attn.level_attn.bias", "lvl_attn.bias", None),
]
OTHER_MEANING = [
    (DENSE, "backbone.body.bn1.bias", "backbone.0.body.bn1.bias", "backbone.stem.conv1.norm.bias"),
    (
        DENSE,
        "backbone.body.layer3.5.bn2.bias",
        "backbone.0.body.layer3.5.bn2.bias",
        "backbone.res4.5.conv2.norm.bias",
    ),
    (
        DENSE,
        "backbone.body.layer1.0.downsample.0.weight",
        "backbone.0.body.layer1.0.downsample.0.weight",
        "backbone.res2.0.shortcut.weight",
    ),
    (DENSE, "neck.convs.0.bias", "input_proj.bias", "input_proj.bias"),
    (DENSE, "queries.anchors.weight", "refpoint_embed.weight", "anchor_box_embed.weight"),
    (
        DENSE,
        "transformer.decoder.norm.bias",
        "transformer.decoder.norm.bias",
        "transformer.decoder.post_norm_layer.bias",
    ),
    (DEFORMABLE, "neck.norms.3.bias", "input_proj.3.1.bias", "neck.extra_convs.0.norm.bias"),
    (DEFORMABLE, "neck.convs.2.bias", "input_proj.2.0.bias", "neck.convs.2.conv.bias"),
    (DEFORMABLE, "queries.content.weight", "tgt_embed.weight", "tgt_embed.weight"),
    (DEFORMABLE, "queries.anchors.weight", "refpoint_embed.weight", "refpoint_embed.weight"),
    (DEFORMABLE, "heads.class_embed.5.bias", "class_embed.5.bias", "class_embed.5.bias"),
    (TWO_STAGE, "queries.class_embed.bias", "class_embed.6.bias", "class_embed.6.bias"),
    (
        TWO_STAGE,
        "queries.bbox_embed.layers.1.bias",
        "bbox_embed.6.layers.1.bias",
        "bbox_embed.6.layers.1.bias",
    ),
    (
        TWO_STAGE,
        "queries.norm.bias",
        "transformer.enc_output_norm.bias",
        "transformer.enc_output_norm.bias",
    ),
]


@pytest.mark.parametrize(
    ("traits", "ours", "official", "detrex"),
    [
        *(
            (t, *(None if name is None else DECODER + name for name in names))
            for t, *names in MEANING
        ),
        *OTHER_MEANING,
    ],
)
def test_each_tensor_has_the_published_name_of_what_it_does(traits, ours, official, detrex):
    for name, their in (("official", official), ("detrex", detrex)):
        if their is not None:
            pairs = LAYOUTS[name].pairs_of(traits)
            assert Renaming(pairs)(ours) == their
            assert Renaming((second, first) for first, second in pairs)(their) == ours


@pytest.mark.parametrize("layout", ["official", "detrex"])
@pytest.mark.parametrize("traits", [DENSE, DEFORMABLE, ENCODER_ONLY, TWO_STAGE])
def test_no_two_pairs_share_a_template(layout, traits):
    ours, theirs = zip(*LAYOUTS[layout].pairs_of(traits), strict=True)
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
