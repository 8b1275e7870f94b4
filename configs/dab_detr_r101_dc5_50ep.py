"""DAB-DETR-R101-DC5, 50 epochs: 45.8 AP on COCO val2017.

detrex lists converted weights with 45.7 AP, but links those of another model, DETR-R101-DC5.

Row: DAB-DETR-DC5-R101, Table 2
Source: DAB-DETR paper, https://arxiv.org/abs/2201.12329
Weights: none published
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_detr_r50 import model

model.backbone.name = "resnet101"
model.backbone.dilation = True
model.neck.in_strides = [16]
