"""DN-Deformable-DETR with ResNet-50: DAB-Deformable-DETR with query denoising.

Li et al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305). 47 409 387 parameters with 80
classes.
"""

from .dab_deformable_detr_r50 import model
from .parts import denoising

model.queries.indicator = True
model.denoising = denoising
