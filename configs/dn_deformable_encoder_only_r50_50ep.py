"""DN-Deformable-DETR-R50, deformable encoder only, 50 epochs: 48.6 AP on COCO val2017.

Row: DN-DAB-Deformable-DETR (Deformable Encoder Only); Table 3 of the paper
Source: README of the authors' code, https://github.com/IDEA-Research/DN-DETR
Weights: a folder of the authors' model zoo on Google Drive (file name not known)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_deformable_encoder_only_r50 import model

# Section 5.1 of the paper; the README's command leaves the code's five groups.
model.denoising.num_groups = 10
model.denoising.max_queries = 1000
