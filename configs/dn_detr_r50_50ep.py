"""DN-DETR-R50, 50 epochs: 44.4 AP on COCO val2017.

Row: DN-DETR-R50; Table 1 of the paper has 44.1
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: checkpoint_optimized_44.7ap.pth (authors), dn_detr_r50_50ep.pth (detrex's training: 44.7
    AP)
Licence: Apache-2.0
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_detr_r50 import model

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
train.output_dir = "output/dn_detr_r50_50ep"
