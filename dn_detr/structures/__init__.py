"""Data structures: boxes, padded image batches, instances."""

from __future__ import annotations

from .boxes import (
    at_least_float32,
    box_area,
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    inverse_sigmoid,
    pairwise_generalized_box_iou,
)
from .image_batch import downsample_mask, may_hold_padding, pad_images, valid_sizes
from .instances import Boxes, Instances

__all__ = [
    "Boxes",
    "Instances",
    "at_least_float32",
    "box_area",
    "box_cxcywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "downsample_mask",
    "generalized_box_iou",
    "inverse_sigmoid",
    "may_hold_padding",
    "pad_images",
    "pairwise_generalized_box_iou",
    "valid_sizes",
]
