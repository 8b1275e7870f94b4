"""Deformable-DETR-R50 with box refinement, 50 epochs: 46.2 AP on COCO val2017.

Row: + iterative bounding box refinement
Source: README of the authors' code, https://github.com/fundamentalvision/Deformable-DETR
Weights: a file that the README of the authors links (file name not known),
    SenseTime/deformable-detr-with-box-refine (Hugging Face)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .common.optimizer import optimizer
from .models.deformable_detr_r50_refine import model

dataloader.train.total_batch_size = 32
