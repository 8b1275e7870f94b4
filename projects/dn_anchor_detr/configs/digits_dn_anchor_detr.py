"""A small Anchor DETR with denoising that learns handwritten digits, 5 epochs; no published AP.

Weights: none published
"""

from dn_detr.configs.common.digits import dataloader, lr_schedule, make_small, optimizer, train

from .models.anchor_detr_r50 import model
from .models.denoising import denoising as _denoising

make_small(model)
model.num_queries = 10  # points, each with three patterns
model.denoising = _denoising
