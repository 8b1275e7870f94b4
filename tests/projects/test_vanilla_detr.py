"""DETR against Hugging Face transformers, an independent implementation, on random weights."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import load_tensors
from dn_detr.checkpoint.coco_classes import COCO_IDS
from dn_detr.config import get_config, instantiate
from tests.modeling.conftest import make_sample

transformers = pytest.importorskip(
    "transformers", reason="compares with Hugging Face transformers, which is not installed"
)


def test_predictions_are_those_of_transformers():
    torch.manual_seed(0)
    theirs = transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone_config=transformers.ResNetConfig(
                embedding_size=64,
                hidden_sizes=[64, 128, 256, 512],
                depths=[2, 2, 2, 2],
                layer_type="basic",
                out_features=["stage4"],
            ),
            d_model=128,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            num_queries=20,
            num_labels=10,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # so that queries and images differ
            spread = 0.02 if "backbone" in name or parameter.dim() == 1 else 0.15
            parameter.add_(spread * torch.randn_like(parameter))
    cfg = get_config("digits_vanilla_detr").model
    cfg.num_queries = 20
    cfg.backbone.out_features, cfg.neck.in_channels = ["layer4"], [512]
    cfg.neck.in_strides = [32]
    cfg.backbone.mask_padding = cfg.neck.mask_padding = False  # as published
    for half in (cfg.transformer.encoder, cfg.transformer.decoder):
        half.layer.feedforward_dim = 256
    cfg.backbone.batch_norm = "frozen"
    ours = instantiate(cfg).eval()
    report = load_tensors(ours, theirs.state_dict())
    assert report.layout == "huggingface" and report.fresh == ()
    images, mask = ours.preprocess([make_sample(96, 128, 0, 0), make_sample(75, 110, 0, 1)])
    with torch.no_grad():
        found = ours.forward_tensors(images, mask)
        expected = theirs(pixel_values=images, pixel_mask=~mask)
    torch.testing.assert_close(found["pred_logits"], expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pred_boxes"], expected.pred_boxes, rtol=0, atol=1e-4)
    assert found["pred_logits"].std(1).mean() > 1e-3


@pytest.mark.parametrize("name", ["vanilla_detr_r50_500ep", "dn_vanilla_detr_r50_300ep"])
def test_rows_of_category_ids_go_to_their_classes_and_no_object_stays_last(name):
    """A published file has 91 rows of category ids and one of "no object"."""
    published = get_config("vanilla_detr_r50_500ep").model
    published.num_classes = 91
    source = instantiate(published)
    model = instantiate(get_config(name).model)
    fine_tune = model.denoising is not None  # its label table is in no such file
    fresh = ["denoising.*"] if fine_tune else []
    file = source.key_maps[0].to_theirs(source.state_dict())
    report = load_tensors(model, file, fine_tune=fine_tune, fresh=fresh)
    rows = torch.tensor([*COCO_IDS, 91])
    expected = source.heads.class_embed[0].weight[rows]
    assert torch.equal(model.heads.class_embed[0].weight, expected)
    assert len(report.mapped_classes) == 80
