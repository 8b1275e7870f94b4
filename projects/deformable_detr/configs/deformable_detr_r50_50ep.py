"""Deformable-DETR-R50, 50 epochs: 44.5 AP on COCO val2017.

Row: Deformable DETR
Source: README of the authors' code, https://github.com/fundamentalvision/Deformable-DETR
Weights: a file that the README of the authors links (file name not known),
    SenseTime/deformable-detr (Hugging Face)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .common.optimizer import optimizer
from .models.deformable_detr_r50 import model

dataloader.train.total_batch_size = 32
