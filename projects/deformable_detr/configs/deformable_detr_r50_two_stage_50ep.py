"""Deformable-DETR-R50, two-stage, 50 epochs: 46.9 AP on COCO val2017.

Row: ++ two-stage Deformable DETR
Source: README of the authors' code, https://github.com/fundamentalvision/Deformable-DETR
Weights: a file that the README of the authors links (file name not known),
    SenseTime/deformable-detr-with-box-refine-two-stage (Hugging Face)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .common.optimizer import optimizer
from .models.deformable_detr_r50_two_stage import model

dataloader.train.total_batch_size = 32
