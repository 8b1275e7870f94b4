"""DAB-DETR-R101, 50 epochs: 43.5 AP on COCO val2017.

Row: DAB-DETR-R101, Table 2
Source: DAB-DETR paper, https://arxiv.org/abs/2201.12329
Weights: dab_detr_r101_50ep.pth (detrex's training: 44.0 AP)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_detr_r50 import model

model.backbone.name = "resnet101"
