"""Conditional-DETR-R101-DC5, 50 epochs: 45.0 AP on COCO val2017.

Row: Conditional DETR-DC5-R101
Source: README of the authors' code, https://github.com/Atten4Vis/ConditionalDETR
Weights: a file that the README of the authors links (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .models.conditional_detr_r50 import model

dataloader.train.total_batch_size = 8
model.backbone.name = "resnet101"
model.backbone.dilation = True
model.neck.in_strides = [16]
