"""DETR-R101-DC5, 500 epochs: 44.9 AP on COCO val2017.

Row: DETR-DC5 R101
Source: README of the authors' code, https://github.com/facebookresearch/detr
Weights: detr-r101-dc5-a2e86def.pth (authors)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_500ep import lr_schedule, train
from .models.vanilla_detr_r50 import model

model.backbone.name = "resnet101"
model.backbone.dilation = True
model.neck.in_strides = [16]
dataloader.train.total_batch_size = 64
