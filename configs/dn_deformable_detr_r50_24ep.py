"""DN-Deformable-DETR-R50, 24 epochs: 48.4 AP on COCO val2017.

Row: DN-DAB-Deformable-DETR-R50-v2; the extended paper has 48.4 after 25 epochs
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_deformable_detr_r50 import model

lr_schedule = L(multi_step)(milestones=[20], gamma=0.1)  # not published for 24 epochs
train.epochs = 24
