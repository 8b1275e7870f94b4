"""DAB-DETR-R101-DC5, 50 epochs: 45.8 AP on COCO val2017.

detrex lists converted weights with 45.7 AP, but links those of another model, DETR-R101-DC5.

Row: DAB-DETR-DC5-R101, Table 2
Source: DAB-DETR paper, https://arxiv.org/abs/2201.12329
Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dab_detr_r50 import model

model.backbone.name = "resnet101"
model.backbone.dilation = True
model.neck.in_strides = [16]

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
train.output_dir = "output/dab_detr_r101_dc5_50ep"
