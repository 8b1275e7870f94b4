"""A small Conditional DETR with denoising for handwritten digits, 5 epochs; no published AP.

Weights: none published
"""

from dn_detr.configs.common.digits import dataloader, lr_schedule, make_small, optimizer, train

from .models.conditional_detr_r50 import model
from .models.denoising import denoising as _denoising

make_small(model)
model.denoising = _denoising
