"""DAB-DETR-R50-DC5, 3 patterns, 50 epochs: 45.7 AP on COCO val2017.

Row: DAB-DETR-R50-DC5(3 pat); Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DAB-DETR
Weights: converted_dab_detr_r50_dc5_3patterns.pth (detrex),
    IDEA-Research/dab-detr-resnet-50-dc5-pat3 (Hugging Face)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_detr_r50 import model

model.backbone.dilation = True
model.neck.in_strides = [16]
model.num_patterns = 3
