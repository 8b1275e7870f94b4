"""DAB-Deformable-DETR-R50, two-stage, 50 epochs: 49.7 AP on COCO val2017.

Row: DAB-Deformable-DETR-R50-Two-Stage
Source: model zoo of detrex,
    https://github.com/IDEA-Research/detrex/blob/main/docs/source/tutorials/Model_Zoo.md
Weights: dab_deformable_detr_r50_two_stage_49_7AP.pth (detrex),
    dab_deformable_r50_two_stage_50ep.pth (detrex: 49.5 AP)
Licence: Apache-2.0
"""

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dab_deformable_detr_r50_two_stage import model

model.postprocess.num_select = 300  # as detrex, whose result this is
