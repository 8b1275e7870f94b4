"""DN-DETR-R50, 50 epochs: 44.4 AP on COCO val2017.

Row: DN-DETR-R50; Table 1 of the paper has 44.1
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: checkpoint_optimized_44.7ap.pth (authors), dn_detr_r50_50ep.pth (detrex's training: 44.7
    AP)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_detr_r50 import model
