"""A small DETR with denoising that learns handwritten digits, 5 epochs; no published AP.

Weights: none published
"""

from dn_detr.configs.common.digits import dataloader, lr_schedule, make_small, optimizer, train

from .models.denoising import denoising as _denoising
from .models.vanilla_detr_r50 import model

make_small(model)
model.denoising = _denoising
