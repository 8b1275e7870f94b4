"""DINO-Swin-L, 5 scales, 36 epochs: 58.5 AP on COCO val2017.

Row: DINO-5scale Swin-L, 36 epochs
Source: README of the authors' code, https://github.com/IDEA-Research/DINO
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_36ep import lr_schedule, train
from .models.dino_swin_l_5scale import model
