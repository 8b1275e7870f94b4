"""DINO-R50 of the DN-DETR repository, two-stage, 36 epochs: 50.8 AP on COCO val2017.

Row: the news of 2022/11, 50.8 to 51.0 AP, which does not say of one or two stages
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: none published
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_36ep import lr_schedule, train
from .models.dn_dino_r50_two_stage import model
