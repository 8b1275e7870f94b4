"""DAB-Deformable-DETR with ResNet-50: DAB-DETR with deformable attention over four levels.

Zhu et al., "Deformable DETR", 2021 (https://arxiv.org/abs/2010.04159), with the anchor boxes of
Liu et al., "DAB-DETR", 2022 (https://arxiv.org/abs/2201.12329). 47 389 032 parameters with 80
classes.
"""

from dn_detr.config import LazyCall as L
from dn_detr.modeling.transformers import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
)

from .dab_detr_r50 import model

model.backbone.out_features = ["layer2", "layer3", "layer4"]
model.neck.in_channels = [512, 1024, 2048]
model.neck.in_strides = [8, 16, 32]
model.neck.num_levels = 4
model.neck.num_groups = 32
model.neck.mask_padding = True
model.position_embedding.temperature = 10000
model.position_embedding.offset = -0.5
model.queries.content = "per_query"

_layer = dict(
    embed_dim="${model.transformer.embed_dim}",
    num_heads=8,
    feedforward_dim=2048,
    num_levels="${model.neck.num_levels}",
    num_points=4,
    dropout=0.0,
    _partial_=True,  # makes each of the layers
)
model.transformer.encoder = L(DeformableEncoder)(
    layer=L(DeformableEncoderLayer)(**_layer), num_layers=6
)
model.transformer.decoder = L(DeformableDecoder)(
    layer=L(DeformableDecoderLayer)(**_layer),
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
    final_norm=False,
    look_forward_twice=False,
    query_scale=True,
    padded_query_pos=False,
)

model.heads.shared = False  # a class head and a box head of every layer
model.heads.size_bias = -2.0
model.postprocess.num_select = 100
