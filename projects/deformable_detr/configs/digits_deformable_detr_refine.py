"""A small Deformable DETR with box refinement for handwritten digits, 5 epochs; no published AP.

Weights: none published
"""

from dn_detr.configs.common.digits import dataloader, lr_schedule, make_small, optimizer, train

from .models.deformable_detr_r50_refine import model

make_small(model)
