"""DINO-Swin-L, 5 scales, 12 epochs: 57.3 AP on COCO val2017.

The authors' weights have other names of the backbone's tensors than timm's and do not load.

Row: DINO-5scale Swin-L, 12 epochs
Source: README of the authors' code, https://github.com/IDEA-Research/DINO
Weights: none published
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_swin_l_5scale import model
