"""DN-DETR-R101, 12 epochs; no published AP.

The paper's recipe for 12 epochs; it prints no result of this model.

Weights: none published
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_12ep import lr_schedule, train
from .models.dn_detr_r50 import model

model.backbone.name = "resnet101"
