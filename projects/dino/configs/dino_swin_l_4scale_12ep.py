"""DINO-Swin-L, 4 scales, 12 epochs: 56.8 AP on COCO val2017.

Row: DINO-4scale Swin-L, 12 epochs
Source: README of the authors' code, https://github.com/IDEA-Research/DINO
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_swin_l_4scale import model
