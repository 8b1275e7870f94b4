"""DN-Deformable-DETR-R101, deformable encoder only, 12 epochs: 44.1 AP on COCO val2017.

Row: DN-DAB-Deformable-DETR (Deformable Encoder Only); Table 2 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_12ep import lr_schedule, train
from .models.dn_deformable_encoder_only_r50 import model

model.backbone.name = "resnet101"
# Section 5.1 of the paper; the README's command leaves the code's five groups.
model.denoising.num_groups = 10
model.denoising.max_queries = 1000
