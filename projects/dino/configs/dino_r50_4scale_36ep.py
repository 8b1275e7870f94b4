"""DINO-R50, 4 scales, 36 epochs: 50.9 AP on COCO val2017.

Row: DINO-4scale R50, 36 epochs; Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DINO
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_36ep import lr_schedule, train
from .models.dino_r50 import model
