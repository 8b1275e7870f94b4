"""DN-DETR-R50-DC5, 50 epochs: 46.3 AP on COCO val2017.

Row: DN-DETR-R50-DC5; Table 1 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: a folder of the authors' model zoo on Google Drive (file name not known),
    converted_dn_detr_r50_dc5.pth (detrex)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_detr_r50 import model

model.backbone.dilation = True
model.neck.in_strides = [16]
