"""The published initialisation, which training dynamics depend on (spec: official code)."""

from __future__ import annotations

import math

import pytest
import torch

from dn_detr.config import get_config, instantiate
from dn_detr.layers import MSDeformAttn
from dn_detr.modeling import Detector


@pytest.fixture(scope="module")
def fresh() -> Detector:
    torch.manual_seed(0)
    model: Detector = instantiate(get_config("dn_deformable_detr_r50_50ep.py").model)
    return model


def _xavier_bound(weight: torch.Tensor) -> float:
    return math.sqrt(6 / (weight[0].numel() + weight.shape[0] * weight[0, 0].numel()))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.encoder.layers.5.ffn.linear1.weight",
        "transformer.decoder.layers.0.self_attn.in_proj_weight",
        "transformer.decoder.layers.0.self_attn.out_proj.weight",
        "transformer.decoder.ref_point_head.layers.0.weight",
        "transformer.decoder.query_scale.layers.1.weight",
        "transformer.encoder.layers.0.self_attn.value_proj.weight",
        "neck.convs.0.weight",
        "neck.convs.3.weight",
    ],
)
def test_weights_are_xavier_uniform(fresh, name):
    weight = fresh.state_dict()[name]
    assert weight.abs().max().item() == pytest.approx(_xavier_bound(weight), rel=0.01)


def test_deformable_attention_starts_from_its_grid_with_equal_weights(fresh):
    for module in fresh.transformer.modules():
        if isinstance(module, MSDeformAttn):
            assert not module.sampling_offsets.weight.any() and module.sampling_offsets.bias.any()
            assert not module.attention_weights.weight.any()


@pytest.mark.parametrize(
    "name",
    [
        "transformer.level_embed",
        "queries.content.weight",
        "queries.anchors.weight",
        "denoising.label_embed.weight",
    ],
)
def test_embeddings_are_standard_normal(fresh, name):
    values = fresh.state_dict()[name]
    assert values.mean().item() == pytest.approx(0, abs=0.1)
    assert values.std().item() == pytest.approx(1, abs=0.1)


def test_classes_start_at_the_focal_prior(fresh):
    for head in fresh.heads.class_embed:
        assert head.bias.sigmoid().tolist() == pytest.approx([0.01] * 80, rel=1e-4)


def test_boxes_start_at_their_anchor_but_for_the_first_layers_sides(fresh):
    for layer, head in enumerate(fresh.heads.bbox_embed):
        assert not head.layers[-1].weight.any()
        assert head.layers[-1].bias.tolist() == ([0, 0, -2, -2] if layer == 0 else [0] * 4)


def test_heads_of_all_layers_start_equal(fresh):
    first, *others = (head.weight for head in fresh.heads.class_embed)
    assert all(torch.equal(first, other) for other in others)
