"""Anchor-DETR-R50-DC5 with denoising, 12 epochs: 39.4 AP on COCO val2017.

Row: DN-Anchor-DETR-DC5-R50, Table 3
Source: DN-DETR paper, extended version, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.anchor_detr_r50 import model
from .models.denoising import denoising as _denoising

model.backbone.dilation = True
model.neck.in_strides = [16]
model.denoising = _denoising
