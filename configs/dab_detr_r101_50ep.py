"""DAB-DETR-R101, 50 epochs: 43.5 AP on COCO val2017.

Row: DAB-DETR-R101, Table 2
Source: DAB-DETR paper, https://arxiv.org/abs/2201.12329
Weights: dab_detr_r101_50ep.pth (detrex's training: 44.0 AP)
Licence: Apache-2.0
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dab_detr_r50 import model

model.backbone.name = "resnet101"

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
train.output_dir = "output/dab_detr_r101_50ep"
