"""DN-DETR-R50-DC5, 3 patterns, 12 epochs: 41.7 AP on COCO val2017.

Row: DN-DAB-DETR-R50-DC5(3 pat); Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_12ep import lr_schedule, train
from .models.dn_detr_r50 import model

model.backbone.dilation = True
model.neck.in_strides = [16]
model.num_patterns = 3
