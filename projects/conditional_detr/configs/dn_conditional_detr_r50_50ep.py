"""Conditional-DETR-R50 with denoising, 50 epochs; no published AP.

Weights: none published
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .models.conditional_detr_r50 import model
from .models.denoising import denoising as _denoising

model.denoising = _denoising
