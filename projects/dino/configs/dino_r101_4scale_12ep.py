"""DINO-R101, 4 scales, 12 epochs: 50.0 AP on COCO val2017.

In detrex's version; the authors have none.

Row: DINO-R101-4scale
Source: README of detrex's projects/dino,
    https://github.com/IDEA-Research/detrex/blob/main/projects/dino/README.md
Weights: dino_r101_4scale_12ep.pth (detrex)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_r50_detrex import model

model.backbone.name = "resnet101"
