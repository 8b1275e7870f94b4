"""A small detector and batches for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector
from dn_detr.structures import Boxes, Instances


def make_sample(
    height: int, width: int, boxes: int, seed: int, *, num_classes: int = 10
) -> dict[str, Any]:
    """A noise image with random boxes, in the detector's input format."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(boxes, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes_xyxy = torch.cat([corners.amin(1), corners.amax(1)], dim=-1)
    return {
        "image": torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8),
        "height": 2 * height,
        "width": 2 * width,
        "image_id": seed,
        "seed": seed,
        "instances": Instances(
            (height, width),
            gt_boxes=Boxes(boxes_xyxy),
            gt_classes=torch.randint(num_classes, (boxes,), generator=generator),
        ),
    }


def away_from_initialisation(config: Any) -> Detector:
    """A detector with random weights; at its initialisation many gradients are exactly zero."""
    torch.manual_seed(0)
    detector: Detector = instantiate(config)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return detector


@pytest.fixture
def small_config() -> Any:
    """The model node of the digits demo, but with frozen normalisation: no batch statistics."""
    cfg = get_config("digits_dn_deformable_detr.py").model
    cfg.backbone.batch_norm = "frozen"
    return cfg


@pytest.fixture
def small(small_config) -> Detector:
    """A small detector."""
    return away_from_initialisation(small_config)


FAMILIES = [
    "dab_detr_r50",
    "dn_detr_r50",
    "dab_deformable_detr_r50",
    "dab_deformable_detr_r50_two_stage",
    "dn_deformable_detr_r50",
    "dino_r50",
    "dn_deformable_encoder_only_r50",
    "digits_dn_vanilla_detr",
    "digits_dn_anchor_detr",
    "digits_dn_conditional_detr",
    "digits_deformable_detr",
    "digits_deformable_detr_two_stage",
]
WITH_FASTER_RCNN = [*FAMILIES, "digits_dn_faster_rcnn"]


def small_model_config(name: str) -> Any:
    """A model of a folder `configs/models` with a small backbone, and fewer and narrower layers.

    Args:
        name: of a file of the folder; or a config of the digits, which is small already.
    """
    if name.startswith("digits_"):
        cfg = get_config(name).model
        cfg.backbone.batch_norm = "frozen"
        if "transformer" not in cfg:  # Faster R-CNN; of few regions it samples all that it may
            cfg.update(box_batch_size_per_image=8, rpn_batch_size_per_image=16)
            return cfg
        for half in (cfg.transformer.encoder, cfg.transformer.decoder):
            half.layer.update({"dropout": 0.0} if "dropout" in half.layer else {})
        return cfg
    cfg = get_config(f"models/{name}.py").model
    several_levels = cfg.neck.num_levels > 1
    cfg.num_classes, cfg.num_queries = 10, 30
    cfg.backbone.update(name="resnet18", weights=None)
    cfg.backbone.out_features = ["layer2", "layer3"] if several_levels else ["layer3"]
    cfg.neck.in_channels = [128, 256] if several_levels else [256]
    cfg.neck.in_strides = [8, 16] if several_levels else [16]
    cfg.neck.num_levels = 3 if several_levels else 1
    cfg.position_embedding.num_pos_feats = 64
    cfg.transformer.embed_dim = 128
    for half, num_layers in ((cfg.transformer.encoder, 2), (cfg.transformer.decoder, 3)):
        half.num_layers = num_layers
        half.layer.update(num_heads=4, feedforward_dim=256)
    return cfg


@pytest.fixture(params=FAMILIES)
def family_config(request) -> Any:
    """The model node of a small detector of every family."""
    return small_model_config(request.param)


@pytest.fixture
def family(family_config) -> Detector:
    """A small detector of every family."""
    return away_from_initialisation(family_config)
