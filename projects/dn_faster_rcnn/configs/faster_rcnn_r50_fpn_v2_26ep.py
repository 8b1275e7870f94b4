"""Faster-RCNN-R50-FPN v2, 26 epochs; no published AP.

The weights are of a longer schedule with other augmentation, torchvision's pull request 5763.

Weights: fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth (torchvision: 46.7)
Licence: BSD-3-Clause
"""

from .common.schedule_26ep import dataloader, lr_schedule, optimizer, train
from .models.faster_rcnn_r50_fpn_v2 import model
