"""DINO with Swin-L, five scales."""

from dn_detr.config import LazyCall as L
from dn_detr.modeling import TimmBackbone

from .dino_r50_5scale import model

model.backbone = L(TimmBackbone)(
    name="swin_large_patch4_window12_384.ms_in22k",
    out_indices=[0, 1, 2, 3],
    frozen_stages=0,
    drop_path=0.2,
    output_norm=True,
    weights="pretrained",
    arguments=dict(always_partition=True),  # windows of the last stage are shifted, too
)
model.neck.in_channels = [192, 384, 768, 1536]
model.neck.in_strides = [4, 8, 16, 32]
