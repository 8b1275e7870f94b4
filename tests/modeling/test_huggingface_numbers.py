"""The models against Hugging Face transformers, an independent implementation, on random weights.

Its DAB-DETR is ours, except for the clamp of the inverse sigmoid (1e-5 there, the published 1e-3
here), so all boxes are kept where no clamp acts. Its Deformable DETR has another decoder: compared
up to the memory.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dn_detr.checkpoint import HuggingFaceLayout
from dn_detr.config import get_config, instantiate
from dn_detr.structures import pad_images

from .goldens import assert_near, build_published, evaluate, recording

transformers = pytest.importorskip(
    "transformers", reason="compares with Hugging Face transformers, which is not installed"
)

TOLERANCE = 1e-4
SIZES = ((96, 128), (75, 110))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return pad_images([torch.randn(3, *size, generator=generator) for size in SIZES])


def _randomise(model: nn.Module) -> None:
    """Give every tensor random values for which the outputs depend on queries and images."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            value = 1 + 0.1 * noise.abs()
        elif name.endswith("running_mean"):
            value = 0.1 * noise
        elif name.endswith("bias"):
            value = 0.02 * noise
        elif tensor.dim() == 1:
            value = (0.25 if tensor.numel() == 1 else 1.0) + 0.1 * noise
        elif "embedding" in name or "level_embed" in name or "patterns" in name:
            value = 0.7 * noise
        else:
            # Without a mean the positive features of a deep network do not drown the signal.
            centred = noise - noise.mean(1, keepdim=True)
            value = _gain(name) * centred / math.sqrt(tensor[0].numel())
        tensor.copy_(value)


def _gain(name: str) -> float:
    """More than 1 where queries would otherwise all become alike, less where boxes move."""
    gains = (
        (r"(query|key)_(content|pos|pos_sine)_proj\.", 2.5),
        (r"cross_attn\.output_proj\.", 2.5),
        (r"self_attn\.(out|output)_proj\.", 0.3),
        (r"bbox_(embed|predictor)\.layers\.2\.", 0.2),
    )
    return next((gain for pattern, gain in gains if re.search(pattern, name)), 1.0)


def _backbone(source: str) -> dict[str, Any]:
    """Arguments for a ResNet-50 of timm or of transformers, without weights."""
    if source == "timm":
        pytest.importorskip("timm", reason="the backbone of published files is timm's")
        return {"use_timm_backbone": True, "backbone": "resnet50"}
    return {"backbone_config": transformers.ResNetConfig(out_features=["stage4"])}


@pytest.mark.parametrize(("backbone", "patterns"), [("timm", 0), ("transformers", 3)])
def test_dab_detr_predicts_what_transformers_predicts(batch, backbone, patterns):
    config = transformers.DabDetrConfig(
        num_labels=91, num_queries=60, num_patterns=patterns, **_backbone(backbone)
    )
    theirs = transformers.DabDetrForObjectDetection(config).eval()
    _randomise(theirs)
    ours = build_published(
        "dab_detr_r50",
        theirs.state_dict(),
        num_classes=91,
        num_queries=60,
        num_patterns=patterns,
    )
    images, mask = batch
    with torch.no_grad():
        expected = theirs(images, pixel_mask=(~mask).long())
    found = evaluate(ours, images, mask)
    assert found.references.min() > 2e-3 and found.references.max() < 1 - 2e-3
    assert found.logits[-1].std(1).mean() > 0.02  # over queries
    assert (found.logits[-1, 0] - found.logits[-1, 1]).std() > 0.02
    assert_near(found.logits[-1], expected.logits, TOLERANCE)
    assert_near(found.boxes[-1], expected.pred_boxes, TOLERANCE)


def test_deformable_encoder_computes_what_transformers_computes(batch):
    pytest.importorskip("timm", reason="the backbone of published files is timm's")
    theirs = transformers.DeformableDetrModel(
        transformers.DeformableDetrConfig(encoder_ffn_dim=2048, decoder_layers=1)
    ).eval()
    _randomise(theirs)
    ours = _deformable_with_encoder_of(theirs)
    images, mask = batch
    parts = {"backbone": theirs.backbone, "encoder": theirs.encoder}
    parts |= {f"level{i}": projection for i, projection in enumerate(theirs.input_proj)}
    with torch.no_grad(), recording(parts) as expected:
        theirs(images, pixel_mask=(~mask).long())
    with recording({"neck": ours.neck}) as calls:
        found = evaluate(ours, images, mask)
    (maps, masks) = calls["neck"][-1]
    for feature, (expected_feature, _) in zip(
        found.features, expected["backbone"][-1], strict=True
    ):
        assert_near(feature, expected_feature, TOLERANCE)
    for level, feature in enumerate(maps):
        assert_near(feature, expected[f"level{level}"][-1], TOLERANCE)
    valid = ~torch.cat([m.flatten(1) for m in masks], dim=1)
    memory = expected["encoder"][-1].last_hidden_state
    assert memory[valid].std(0).mean() > 0.05  # over cells
    assert_near(found.memory[valid], memory[valid], TOLERANCE)


def _deformable_with_encoder_of(theirs: nn.Module) -> Any:
    """Our model with all tensors up to the memory; whole files of it are refused."""
    model_cfg = get_config("models/dab_deformable_detr_r50.py").model
    model_cfg.backbone.mask_padding = False
    model_cfg.neck.mask_padding = False
    ours = instantiate(model_cfg)
    tensors = HuggingFaceLayout().to_ours(theirs.state_dict()).tensors
    shared = ("backbone.", "neck.", "transformer.encoder.", "transformer.level_embed")
    state = ours.state_dict()
    for name in state:
        if name.startswith(shared):
            state[name] = tensors[name]
    ours.load_state_dict(state)
    return ours
