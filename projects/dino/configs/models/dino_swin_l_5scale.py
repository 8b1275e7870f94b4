"""DINO with Swin-L, five scales."""

from .dino_r50_5scale import model
from .dino_swin_l_4scale import model as _swin_l

model.backbone = _swin_l.backbone
model.backbone.out_indices = [0, 1, 2, 3]
model.neck.in_channels = [192, 384, 768, 1536]
