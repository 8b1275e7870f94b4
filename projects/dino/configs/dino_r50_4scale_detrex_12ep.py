"""DINO-R50, 4 scales, detrex's version, 12 epochs: 49.2 AP on COCO val2017.

Row: DINO-R50-4scale, 12 epochs, 100 denoising queries
Source: README of detrex's projects/dino,
    https://github.com/IDEA-Research/detrex/blob/main/projects/dino/README.md
Weights: dino_r50_4scale_12ep_49_2AP.pth (detrex)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_r50_detrex import model
