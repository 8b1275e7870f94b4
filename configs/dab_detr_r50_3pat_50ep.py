"""DAB-DETR-R50, 3 patterns, 50 epochs: 42.6 AP on COCO val2017.

Row: DAB-DETR-R50(3 pat); Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DAB-DETR
Weights: DAB_DETR/R50_pat3/checkpoint.pth (authors), converted_dab_detr_r50_3patterns.pth (detrex:
    42.8 AP), IDEA-Research/dab-detr-resnet-50-pat3 (Hugging Face)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_detr_r50 import model

model.num_patterns = 3
