"""DN-Deformable-DETR-R50, 12 epochs: 46.0 AP on COCO val2017.

Row: DN-Deformable-DETR-R50++, Table 2 of the extended version
Source: DN-DETR paper, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_12ep import lr_schedule, train
from .models.dn_deformable_detr_r50 import model
