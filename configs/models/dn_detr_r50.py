"""DN-DETR with ResNet-50: DAB-DETR with query denoising.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2022
(https://arxiv.org/abs/2203.01305). 43 689 345 parameters with 80 classes.
"""

from .dab_detr_r50 import model
from .parts import denoising

model.queries.content = "shared"  # the label table's "no object" row
model.queries.indicator = True
model.denoising = denoising
model.denoising.embed.no_object_label = False
