"""Box arithmetic of DETR-like detectors.

The format is in the name: `xyxy` is (x1, y1, x2, y2), `cxcywh` is (centre x, centre y, width,
height). `norm` boxes are relative to the unpadded image, in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

# DETR's reference code adds this to both denominators of the GIoU (torchvision adds nothing or
# 1e-7); the published losses contain it.
_IOU_EPS = 1e-6


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert (..., 4) boxes from centre and size to corners."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert (..., 4) boxes from corners to centre and size."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Area of (..., 4) corner boxes; shape (...)."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised intersection over union of boxes that broadcast against each other.

    Args:
        boxes1_xyxy: (..., 4) corners with x2 >= x1 and y2 >= y1, any unit.
        boxes2_xyxy: (..., 4) corners in the same unit.

    Returns:
        (...) values in [-1, 1].

    Source: Rezatofighi et al., "Generalized Intersection over Union", 2019, algorithm 1.
    """
    low = torch.max(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    high = torch.min(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = box_area(boxes1_xyxy) + box_area(boxes2_xyxy) - intersection
    hull_low = torch.min(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    hull_high = torch.max(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    hull = (hull_high - hull_low).clamp(min=0).prod(dim=-1)
    return intersection / (union + _IOU_EPS) - (hull - union) / (hull + _IOU_EPS)


def pairwise_generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """GIoU of every box of (..., N, 4) with every box of (..., M, 4); shape (..., N, M)."""
    return generalized_box_iou(boxes1_xyxy.unsqueeze(-2), boxes2_xyxy.unsqueeze(-3))


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half types, whose digits do not suffice for boxes and losses; keep the others."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of `x` that saturates near 0 and 1.

    Both x and 1 - x are raised to at least `eps`, so the result lies within +-log(1 / eps).
    `torch.logit(eps=...)` clamps x itself and differs near the ends. The published models of
    this family were trained with 1e-3, and it changes their predictions.

    Args:
        x: any shape, nominally in [0, 1].
        eps: smallest value that x and 1 - x may take.

    Source: DN-DETR reference code, behaviour documented as "inverse sigmoid, eps 1e-3".
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
