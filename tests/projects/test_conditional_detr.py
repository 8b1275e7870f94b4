"""Names of Conditional DETR's tensors in its authors' code and in transformers."""

from __future__ import annotations

import re

import pytest
import torch

from dn_detr.checkpoint import load_tensors
from dn_detr.config import get_config
from dn_detr.modeling import Detector
from dn_detr.projects.conditional_detr.modeling import HuggingFaceConditionalLayout
from tests.modeling.conftest import away_from_initialisation

NAME = "digits_conditional_detr"
AUTHORS = {
    "query_embed.weight",
    "input_proj.bias",
    "transformer.encoder.layers.1.self_attn.in_proj_weight",
    "transformer.decoder.layers.0.ca_qpos_proj.weight",
    "transformer.decoder.layers.1.sa_qcontent_proj.weight",
    "transformer.decoder.layers.1.ca_qpos_sine_proj.bias",
    "transformer.decoder.layers.2.cross_attn.out_proj.weight",
    "transformer.decoder.layers.2.norm3.weight",
    "transformer.decoder.query_scale.layers.1.weight",
    "transformer.decoder.ref_point_head.layers.1.bias",
    "transformer.decoder.norm.weight",
    "class_embed.weight",
    "bbox_embed.layers.2.bias",
}
EARLIER = [  # (a name of an earlier version of transformers, today's)
    ("sa_qcontent_proj.weight", "self_attn.q_content_proj.weight"),
    ("sa_kpos_proj.bias", "self_attn.k_pos_proj.bias"),
    ("sa_v_proj.weight", "self_attn.v_proj.weight"),
    ("ca_qpos_sine_proj.weight", "encoder_attn.q_pos_sine_proj.weight"),
    ("ca_v_proj.bias", "encoder_attn.v_proj.bias"),
    ("encoder_attn.out_proj.bias", "encoder_attn.out_proj.bias"),
]


@pytest.fixture(scope="module")
def source() -> Detector:
    return away_from_initialisation(get_config(NAME).model)


def test_a_file_of_the_authors_loads(source):
    file = source.key_maps[0].to_theirs(source.state_dict())
    assert set(file) >= AUTHORS
    assert not any(re.search(r"layers\.[12]\.ca_qpos_proj", name) for name in file)
    model = away_from_initialisation(get_config(NAME).model)
    with torch.no_grad():
        model.queries.anchors.weight.zero_()
    assert load_tensors(model, file).layout == "official"
    assert torch.equal(model.queries.anchors.weight, source.queries.anchors.weight)


@pytest.mark.parametrize(("earlier", "today"), EARLIER)
def test_earlier_versions_of_transformers_have_the_projections_in_the_layer(earlier, today):
    first_name = HuggingFaceConditionalLayout().first_name
    assert first_name(f"model.decoder.layers.3.{earlier}") == f"decoder.layers.3.{today}"
