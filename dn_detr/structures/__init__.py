"""Data structures: boxes, padded image batches, instances."""

from __future__ import annotations

from .boxes import at_least_float32 as at_least_float32
from .boxes import box_area as box_area
from .boxes import box_cxcywh_to_xyxy as box_cxcywh_to_xyxy
from .boxes import box_xyxy_to_cxcywh as box_xyxy_to_cxcywh
from .boxes import generalized_box_iou as generalized_box_iou
from .boxes import inverse_sigmoid as inverse_sigmoid
from .boxes import pairwise_generalized_box_iou as pairwise_generalized_box_iou
from .image_batch import downsample_mask as downsample_mask
from .image_batch import may_hold_padding as may_hold_padding
from .image_batch import pad_images as pad_images
from .image_batch import valid_sizes as valid_sizes
from .instances import Boxes as Boxes
from .instances import Instances as Instances
