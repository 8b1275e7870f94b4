"""DN-DETR-R101, 50 epochs: 45.2 AP on COCO val2017.

Row: DN-DETR-R101, Table 1
Source: DN-DETR paper, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_detr_r50 import model

model.backbone.name = "resnet101"

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
train.output_dir = "output/dn_detr_r101_50ep"
