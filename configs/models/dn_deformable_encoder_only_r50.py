"""DN-DETR with a deformable encoder and a dense decoder over four levels, ResNet-50.

Li et al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305), "deformable encoder only" in the
authors' code. It differs from their start, not from their function: deformable attention, the
neck and the box head keep the initialisation that they have in the other models.
"""

from dn_detr.config import LazyCall as L

from .dab_deformable_detr_r50 import model as _deformable
from .dn_detr_r50 import model

model.num_patterns = 3
model.backbone = _deformable.backbone
model.neck = _deformable.neck
model.transformer.encoder = _deformable.transformer.encoder
model.transformer.decoder.layer.activation = "relu"
