"""DN-Faster-RCNN-R50-FPN, 12 epochs: 38.4 AP on COCO val2017.

`faster_rcnn_r50_fpn_12ep` without denoising: 37.9 AP in the same table.

Row: DN-Faster R-CNN-FPN-R50, Table 3
Source: DN-DETR paper, extended version, https://arxiv.org/abs/2203.01305
Weights: none published
"""

from .common.detection import dataloader, lr_schedule, optimizer, train
from .models.denoising import denoising as _denoising
from .models.faster_rcnn_r50_fpn import model

model.denoising = _denoising
