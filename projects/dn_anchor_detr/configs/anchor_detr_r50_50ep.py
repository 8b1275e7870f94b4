"""Anchor-DETR-R50, 50 epochs: 42.1 AP on COCO val2017.

Row: AnchorDETR R50-C5
Source: README of the authors' code, https://github.com/megvii-research/AnchorDETR
Weights: AnchorDETR_r50_c5.pth (authors)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .models.anchor_detr_r50 import model

dataloader.train.total_batch_size = 8
