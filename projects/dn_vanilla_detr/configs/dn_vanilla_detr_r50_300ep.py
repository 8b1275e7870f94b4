"""DETR-R50 with denoising, 300 epochs: 42.6 AP on COCO val2017.

`vanilla_detr_r50_300ep` without it: 40.6 AP in the same table.

Row: DN-Vanilla-DETR-R50, Table 3
Source: DN-DETR paper, extended version, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer

from .common.schedule_300ep import lr_schedule, train
from .models.denoising import denoising as _denoising
from .models.vanilla_detr_r50 import model

model.denoising = _denoising
