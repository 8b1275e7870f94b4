"""Faster-RCNN-MobileNetV3-FPN, 26 epochs: 32.8 AP on COCO val2017.

Row: FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1
Source: torchvision,
    https://pytorch.org/vision/stable/models/faster_rcnn.html
Weights: fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth (torchvision)
Licence: BSD-3-Clause
"""

from .common.schedule_26ep import dataloader, lr_schedule, optimizer, train
from .models.faster_rcnn_mobilenet_v3_fpn import model
