"""A small Deformable DETR that learns handwritten digits, 5 epochs; no published AP.

Weights: none published
"""

from dn_detr.configs.common.digits import dataloader, lr_schedule, make_small, optimizer, train

from .models.deformable_detr_r50 import model

make_small(model)
