"""DAB-DETR-R50-DC5, 50 epochs: 44.5 AP on COCO val2017.

The temperature is that of the published weights; the paper writes 20 for all models. The weights
DAB-DETR-R50-DC5-fixxy (44.7 AP; IDEA-Research/dab-detr-resnet-50-dc5-fixxy on Hugging Face) need
model.position_embedding.temperature=20.

Row: DAB-DETR-R50-DC5; Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DAB-DETR
Weights: converted_dab_detr_r50_dc5.pth (detrex: 44.6 AP), IDEA-Research/dab-detr-resnet-50-dc5
    (Hugging Face)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_detr_r50 import model

model.backbone.dilation = True
model.neck.in_strides = [16]
model.position_embedding.temperature = 10
