"""A small Faster R-CNN with denoising that learns handwritten digits, 5 epochs; no published AP.

Weights: none published
"""

from .common.digits import dataloader, lr_schedule, make_small, optimizer, train
from .models.denoising import denoising as _denoising
from .models.faster_rcnn_r50_fpn import model

make_small(model)
model.denoising = _denoising
