"""Anchor-DETR-R101, 50 epochs: 43.5 AP on COCO val2017.

Row: AnchorDETR-C5, R101
Source: README of the authors' code, https://github.com/megvii-research/AnchorDETR
Weights: a file that the README of the authors links (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .models.anchor_detr_r50 import model

model.backbone.name = "resnet101"
dataloader.train.total_batch_size = 8
