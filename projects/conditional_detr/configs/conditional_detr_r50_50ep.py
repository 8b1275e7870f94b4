"""Conditional-DETR-R50, 50 epochs: 41.0 AP on COCO val2017.

The paper has 40.9 AP.

Row: Conditional DETR-R50
Source: README of the authors' code, https://github.com/Atten4Vis/ConditionalDETR
Weights: a file that the README of the authors links (file name not known),
    microsoft/conditional-detr-resnet-50 (Hugging Face)
Licence: Apache-2.0
"""

from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_50ep import lr_schedule, train

from .models.conditional_detr_r50 import model
