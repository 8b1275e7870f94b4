"""What is refused although every shape fits, and files that are made to do harm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dn_detr.checkpoint import CheckpointError, load_tensors, read_weights
from dn_detr.config import get_config, instantiate
from tests.checkpoint.layouts import to_layout

from .tiny_models import tiny_model


@pytest.mark.parametrize("file_is_dilated", [True, False])
def test_a_dilated_backbone_of_detrex_is_told_from_another(file_is_dilated):
    cfg = get_config("models/dab_detr_r50.py").model
    cfg.transformer.encoder.num_layers = cfg.transformer.decoder.num_layers = 1
    cfg.backbone.dilation = not file_is_dilated
    cfg.neck.in_strides = [32 if file_is_dilated else 16]
    model = instantiate(cfg)
    other = SimpleNamespace(backbone=SimpleNamespace(out_strides=[16 if file_is_dilated else 32]))
    state = to_layout(model.state_dict(), "detrex", model=other)
    with pytest.raises(CheckpointError, match=r"dilated.*model\.backbone\.dilation"):
        load_tensors(model, state)


@pytest.mark.parametrize(
    ("name", "layout", "reason"),
    [
        ("dn_deformable_encoder_only_r50", "detrex", "no model with a deformable encoder only"),
        ("dab_deformable_detr_r50_two_stage", "official", "pos_trans"),
    ],
)
def test_a_model_that_the_other_code_base_lacks_is_not_written(name, layout, reason):
    with pytest.raises(CheckpointError, match=reason):
        to_layout(tiny_model(name).state_dict(), layout)


def test_denoising_with_patterns_is_not_written_for_detrex():
    state = tiny_model("dn_detr_r50").state_dict()
    state["queries.patterns.weight"] = torch.zeros(
        3, state["transformer.decoder.norm.bias"].numel()
    )
    assert "transformer.patterns.weight" in to_layout(state, "official")
    with pytest.raises(CheckpointError, match="patterns in DAB-DETR only"):
        to_layout(state, "detrex")


@pytest.mark.parametrize(
    "config",
    ['{"id2label": {"99999999999": "a"}}', '{"id2label": {"-1": "a"}}', "[" * 100_000],
    ids=["huge row", "negative row", "deep"],
)
def test_a_harmful_config_beside_the_weights_is_ignored(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path / "model.safetensors")["a"].tolist() == [1, 1]
