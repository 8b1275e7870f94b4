"""Conditional DETR with ResNet-50.

Meng et al., "Conditional DETR for Fast Training Convergence", 2021
(https://arxiv.org/abs/2108.06152).
"""

from dn_detr.checkpoint import Detectron2Layout, TorchvisionLayout
from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dab_detr_r50 import model

from ...modeling import ConditionalDecoder, ConditionalDetrLayout, HuggingFaceConditionalLayout

model.position_embedding.temperature = 10000
model.queries.position_kind = "vector"
model.transformer.encoder.query_scale = False
for _half in (model.transformer.encoder, model.transformer.decoder):
    _half.layer.activation = "relu"
    _half.layer.dropout = 0.1
model.transformer.decoder = L(ConditionalDecoder)(
    layer=model.transformer.decoder.layer,
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
)
model.heads.eps = 1e-5
model.criterion.losses.loss_ce.weight = 2.0
model.postprocess.num_select = 100
model.key_maps = [
    L(ConditionalDetrLayout)(),
    L(HuggingFaceConditionalLayout)(),
    L(TorchvisionLayout)(),
    L(Detectron2Layout)(),
]
