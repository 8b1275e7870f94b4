"""The baselines against Hugging Face transformers, on random weights through the key map."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dn_detr.checkpoint import load_tensors
from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector
from tests.modeling.conftest import make_sample

transformers = pytest.importorskip(
    "transformers", reason="compares with Hugging Face transformers, which is not installed"
)

_LEVELS = {"num_feature_levels": 3}
_TWO_STAGE = {"two_stage": True, "two_stage_num_proposals": 30}
# (a config of ours, a model of theirs, its options)
MODELS = [
    ("digits_vanilla_detr", "Detr", {}),
    ("digits_conditional_detr", "ConditionalDetr", {}),
    ("digits_deformable_detr", "DeformableDetr", _LEVELS),
    ("digits_deformable_detr_refine", "DeformableDetr", {**_LEVELS, "with_box_refine": True}),
    (
        "digits_deformable_detr_two_stage",
        "DeformableDetr",
        {**_LEVELS, **_TWO_STAGE, "with_box_refine": True},
    ),
]


def _theirs(name: str, options: dict[str, Any]) -> Any:
    several = "num_feature_levels" in options
    backbone = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256],
        depths=[2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3"] if several else ["stage3"],
    )
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        num_queries=30,
        num_labels=10,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # so that queries and images differ
            small = "backbone" in name or parameter.dim() == 1
            # Sampling locations that move from layer to layer amplify rounding.
            spread = 0.02 if small else 0.1 if several else 0.15
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def _ours(name: str) -> Detector:
    cfg = get_config(name).model
    cfg.backbone.batch_norm = "frozen"
    cfg.backbone.mask_padding = cfg.neck.mask_padding = False  # as published
    if "mask_padding" in cfg.queries:
        cfg.queries.mask_padding = False
    model: Detector = instantiate(cfg)
    return model.eval()


@pytest.mark.parametrize(("name", "theirs", "options"), MODELS)
def test_predictions_are_those_of_transformers(name, theirs, options):
    reference, model = _theirs(theirs, options), _ours(name)
    report = load_tensors(model, reference.state_dict())
    assert report.layout == "huggingface" and report.fresh == ()
    images, mask = model.preprocess([make_sample(96, 128, 0, 0), make_sample(75, 110, 0, 1)])
    with torch.no_grad():
        found = model.forward_tensors(images, mask)
        expected = reference(pixel_values=images, pixel_mask=~mask)
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-4)
    assert found["pred_logits"].std(1).mean() > 1e-3
