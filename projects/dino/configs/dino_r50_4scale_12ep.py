"""DINO-R50, 4 scales, 12 epochs: 49.0 AP on COCO val2017.

Row: DINO-4scale R50, 12 epochs; Table 1 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DINO
Weights: checkpoint0011_4scale.pth (authors)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_r50 import model
