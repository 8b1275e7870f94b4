"""DN-DETR-R101-DC5, 50 epochs: 47.3 AP on COCO val2017.

Row: DN-DETR-DC5-R101, Table 1
Source: DN-DETR paper, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_detr_r50 import model

model.backbone.name = "resnet101"
model.backbone.dilation = True
model.neck.in_strides = [16]
