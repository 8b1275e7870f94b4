"""DINO-ConvNeXt-T, 4 scales, 12 epochs: 52.4 AP on COCO val2017.

In detrex's version.

Row: convnext-tiny-384
Source: release notes of detrex 0.4.0, https://github.com/IDEA-Research/detrex/releases
Weights: a file of detrex's release 0.4.0 (file name not known)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train

from .models.dino_r50_detrex import model
from .models.dino_swin_l_4scale import model as _swin_l

model.backbone = _swin_l.backbone
model.backbone.name = "convnext_tiny.fb_in22k_ft_in1k_384"
model.backbone.drop_path = 0.0
model.backbone.arguments = None
model.neck.in_channels = [192, 384, 768]
