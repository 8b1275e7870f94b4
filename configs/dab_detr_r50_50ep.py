"""DAB-DETR-R50, 50 epochs: 42.2 AP on COCO val2017.

Row: DAB-DETR-R50; Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DAB-DETR
Weights: DAB_DETR/R50/checkpoint.pth (authors), dab_detr_r50_50ep.pth (detrex's training: 43.3 AP),
    IDEA-Research/dab-detr-resnet-50 (Hugging Face)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_detr_r50 import model
