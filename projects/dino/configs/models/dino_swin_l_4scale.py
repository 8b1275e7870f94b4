"""DINO with Swin-L, four scales."""

from dn_detr.config import LazyCall as L
from dn_detr.modeling import TimmBackbone

from .dino_r50 import model

model.backbone = L(TimmBackbone)(
    name="swin_large_patch4_window12_384.ms_in22k",
    out_indices=[1, 2, 3],
    frozen_stages=0,
    drop_path=0.2,
    output_norm=True,
    weights="pretrained",
    arguments=dict(always_partition=True),  # windows of the last stage are shifted, too
)
model.neck.in_channels = [384, 768, 1536]
