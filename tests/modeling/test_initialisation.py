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
        "denoising.embed.label_embed.weight",
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


@pytest.fixture(scope="module")
def dense() -> Detector:
    torch.manual_seed(0)
    model: Detector = instantiate(get_config("dn_detr_r50_dc5_3pat_12ep.py").model)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "transformer.encoder.layers.5.self_attn.in_proj_weight",
        "transformer.encoder.query_scale.layers.1.weight",
        "transformer.decoder.layers.0.cross_attn.query_pos_proj.weight",
        "transformer.decoder.layers.5.cross_attn.query_pos_sine_proj.weight",
        "transformer.decoder.ref_anchor_head.layers.1.weight",
    ],
)
def test_dense_weights_are_xavier_uniform(dense, name):
    weight = dense.state_dict()[name]
    assert weight.abs().max().item() == pytest.approx(_xavier_bound(weight), rel=0.02)


@pytest.mark.parametrize("name", ["content", "anchors", "patterns"])
def test_dense_queries_are_standard_normal(dense, name):
    values = getattr(dense.queries, name).weight
    assert values.std().item() == pytest.approx(1, abs=0.12)


def test_dense_boxes_start_at_their_anchor_and_activations_at_a_quarter(dense):
    (head,) = dense.heads.bbox_embed
    assert not head.layers[-1].weight.any() and not head.layers[-1].bias.any()
    slopes = [p for n, p in dense.named_parameters() if n.endswith("activation.weight")]
    assert [slope.item() for slope in slopes] == [0.25] * 12


def test_output_projections_of_conditional_attention_start_without_bias(dense):
    for layer in dense.transformer.decoder.layers:
        assert not layer.self_attn.out_proj.bias.any() and not layer.cross_attn.out_proj.bias.any()
