"""DETR-R50, 500 epochs: 42.0 AP on COCO val2017.

Row: DETR R50
Source: README of the authors' code, https://github.com/facebookresearch/detr
Weights: detr-r50-e632da11.pth (authors)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_500ep import lr_schedule, train
from .models.vanilla_detr_r50 import model

dataloader.train.total_batch_size = 64
