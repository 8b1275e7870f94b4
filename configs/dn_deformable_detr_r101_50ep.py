"""DN-Deformable-DETR-R101, 50 epochs; no published AP.

The recipe of the R50 model; neither the paper nor the authors' README has this one.

Weights: none published
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_deformable_detr_r50 import model

model.backbone.name = "resnet101"
