"""What holds for every project: denoising is one line, and the core is not edited."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import CheckpointError, load_tensors
from dn_detr.config import LazyConfig, get_config, instantiate, list_configs

PAIRS = {
    "dn_vanilla_detr_r50_300ep": "vanilla_detr_r50_300ep",
    "dn_anchor_detr_r50_dc5_12ep": "anchor_detr_r50_dc5_12ep",
    "dn_anchor_detr_r50_50ep": "anchor_detr_r50_50ep",
    "dn_conditional_detr_r50_50ep": "conditional_detr_r50_50ep",
    "digits_dn_conditional_detr": "digits_conditional_detr",
    "dn_faster_rcnn_r50_fpn_12ep": "faster_rcnn_r50_fpn_12ep",
    "digits_dn_vanilla_detr": "digits_vanilla_detr",
    "digits_dn_faster_rcnn": "digits_faster_rcnn",
    "digits_dn_anchor_detr": "digits_anchor_detr",
}


@pytest.mark.parametrize(("with_denoising", "without"), PAIRS.items())
def test_a_config_with_denoising_differs_from_its_baseline_in_denoising_alone(
    with_denoising, without
):
    ours, baseline = get_config(with_denoising), get_config(without)
    assert ours.model.denoising is not None and baseline.model.denoising is None
    ours.model.denoising = None
    ours.train.output_dir = baseline.train.output_dir
    assert LazyConfig.to_yaml(ours) == LazyConfig.to_yaml(baseline)


def test_every_pair_is_compared():
    names = {name.removesuffix(".py") for name in list_configs()}
    assert all(name in names for pair in PAIRS.items() for name in pair)


@pytest.mark.parametrize(
    ("source", "into", "named"),
    [
        ("dino_r50_4scale_12ep", "dino_r50_5scale_12ep", "neck.convs.4"),
        ("dino_r50_4scale_12ep", "dino_r50_4scale_detrex_12ep", "heads.class_embed.1"),
        ("dino_r50_4scale_12ep", "dn_deformable_detr_r50_50ep", "queries.anchors"),
        ("dn_deformable_detr_r50_50ep", "dino_r50_4scale_12ep", "queries.output"),
        ("anchor_detr_r50_50ep", "vanilla_detr_r50_500ep", "queries.patterns"),
        ("vanilla_detr_r50_500ep", "dn_detr_r50_50ep", "queries.anchors"),
        ("vanilla_detr_r50_500ep", "conditional_detr_r50_50ep", "query_content_proj"),
        ("deformable_detr_r50_refine_50ep", "deformable_detr_r50_two_stage_50ep", "queries.output"),
        ("faster_rcnn_r50_fpn_12ep", "faster_rcnn_r50_fpn_v2_26ep", "backbone.fpn"),
    ],
)
def test_weights_of_a_sibling_are_refused_with_the_names_that_differ(source, into, named):
    with torch.device("meta"):
        state = instantiate(get_config(source).model).state_dict()
        model = instantiate(get_config(into).model)
    with pytest.raises(CheckpointError, match=rf"(?s){named}.*Use the config that it was trained"):
        load_tensors(model, state)
