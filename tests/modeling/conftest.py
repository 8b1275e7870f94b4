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


@pytest.fixture
def small_config() -> Any:
    """The model node of the digits demo, but with frozen normalisation: no batch statistics."""
    cfg = get_config("digits_dn_deformable_detr.py").model
    cfg.backbone.batch_norm = "frozen"
    return cfg


@pytest.fixture
def small(small_config) -> Detector:
    """A small detector away from its initialisation, where many gradients are exactly zero."""
    torch.manual_seed(0)
    detector: Detector = instantiate(small_config)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return detector
