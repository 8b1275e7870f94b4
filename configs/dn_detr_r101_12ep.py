"""DN-DETR-R101, 12 epochs; no published AP.

The paper's recipe for 12 epochs; it prints no result of this model.

Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.train import train
from .models.dn_detr_r50 import model

model.backbone.name = "resnet101"

lr_schedule = L(multi_step)(milestones=[11], gamma=0.1)
train.epochs = 12
train.output_dir = "output/dn_detr_r101_12ep"
