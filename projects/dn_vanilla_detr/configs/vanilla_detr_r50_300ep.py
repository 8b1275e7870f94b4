"""DETR-R50, 300 epochs: 40.6 AP on COCO val2017.

Row: Vanilla-DETR-R50, Table 3
Source: DN-DETR paper, extended version, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_300ep import lr_schedule, train
from .models.vanilla_detr_r50 import model
