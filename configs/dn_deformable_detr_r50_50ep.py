"""DN-Deformable-DETR-R50, 50 epochs: 49.5 AP on COCO val2017.

Row: DN-DAB-Deformable-DETR-R50-v2; Table 4 of the extended paper
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: checkpoint0049.pth (authors), converted_dn_deformable_detr_r50_50ep.pth (detrex)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_deformable_detr_r50 import model
