"""DN-DETR-Swin-T, 50 epochs; no published AP.

An example of a backbone from timm. The backbone is set up as detrex has it in DAB-DETR-Swin-T, the
same model without denoising, whose 45.2 AP its model zoo prints.

Weights: none published
"""

from dn_detr.config import LazyCall as L
from dn_detr.modeling import TimmBackbone

from .common.coco import dataloader
from .common.optimizer import optimizer
from .common.schedule_50ep import lr_schedule, train
from .models.dn_detr_r50 import model

model.backbone = L(TimmBackbone)(
    name="swin_tiny_patch4_window7_224.ms_in1k",
    out_indices=[3],
    frozen_stages=0,
    drop_path=0.1,
    output_norm=True,
    weights="pretrained",
    arguments=dict(always_partition=True),  # windows of the last stage are shifted, too
)
model.neck.in_channels = [768]
model.neck.in_strides = [32]
