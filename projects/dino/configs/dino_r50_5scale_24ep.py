"""DINO-R50, 5 scales, 24 epochs: 51.3 AP on COCO val2017.

Row: DINO-5scale R50, 24 epochs; Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DINO
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_24ep import lr_schedule, train
from .models.dino_r50_5scale import model
