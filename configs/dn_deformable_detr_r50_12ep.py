"""DN-Deformable-DETR-R50, 12 epochs: 46.0 AP on COCO val2017.

Row: DN-Deformable-DETR-R50++, Table 2 of the extended version
Source: DN-DETR paper, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_deformable_detr_r50 import model

lr_schedule = L(multi_step)(milestones=[11], gamma=0.1)
train.epochs = 12
train.output_dir = "output/dn_deformable_detr_r50_12ep"
