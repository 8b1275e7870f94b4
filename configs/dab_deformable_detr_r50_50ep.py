"""DAB-Deformable-DETR-R50, 50 epochs: 48.7 AP on COCO val2017.

Row: DAB-Deformable-DETR-R50-v2; Table 5 of the paper has 46.8 for an earlier version
Source: README of the authors' code, https://github.com/IDEA-Research/DAB-DETR
Weights: DAB_Deformable_DETR/R50_v2/checkpoint.pth (authors), dab_deformable_detr_r50_50ep_49AP.pth
    (detrex's training: 49.0 AP)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_deformable_detr_r50 import model
