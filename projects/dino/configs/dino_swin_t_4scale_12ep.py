"""DINO-Swin-T, 4 scales, 12 epochs: 51.3 AP on COCO val2017.

In detrex's version.

Row: DINO-Swin-T-224-4scale, IN1k
Source: README of detrex's projects/dino,
    https://github.com/IDEA-Research/detrex/blob/main/projects/dino/README.md
Weights: dino_swin_tiny_224_4scale_12ep.pth (detrex)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_r50_detrex import model
from .models.dino_swin_l_4scale import model as _swin_l

model.backbone = _swin_l.backbone
model.backbone.name = "swin_tiny_patch4_window7_224.ms_in1k"
model.backbone.drop_path = 0.1
model.neck.in_channels = [192, 384, 768]
