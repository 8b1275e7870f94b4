"""DN-Deformable-DETR-R50, 50 epochs: 49.5 AP on COCO val2017.

Row: DN-DAB-Deformable-DETR-R50-v2; Table 4 of the extended paper
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: checkpoint0049.pth (authors), converted_dn_deformable_detr_r50_50ep.pth (detrex)
Licence: Apache-2.0
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_deformable_detr_r50 import model

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
train.output_dir = "output/dn_deformable_detr_r50_50ep"
