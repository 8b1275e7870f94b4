"""DN-Deformable-DETR-R101, 50 epochs; no published AP.

The recipe of the R50 model; neither the paper nor the authors' README has this one.

Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_deformable_detr_r50 import model

model.backbone.name = "resnet101"

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
train.output_dir = "output/dn_deformable_detr_r101_50ep"
