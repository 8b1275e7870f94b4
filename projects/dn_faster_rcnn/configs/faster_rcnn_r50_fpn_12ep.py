"""Faster-RCNN-R50-FPN, 12 epochs: 37.9 AP on COCO val2017.

The weights are torchvision's own, of 26 epochs: 37.0 AP. They need model.backbone.norm_eps=0.

Row: Faster R-CNN-FPN-R50, Table 3
Source: DN-DETR paper, extended version, https://arxiv.org/abs/2203.01305
Weights: fasterrcnn_resnet50_fpn_coco-258fb6c6.pth (torchvision: 37.0)
Licence: BSD-3-Clause
"""

from .common.detection import dataloader, lr_schedule, optimizer, train
from .models.faster_rcnn_r50_fpn import model
