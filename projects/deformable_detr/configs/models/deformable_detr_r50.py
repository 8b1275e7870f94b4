"""Deformable DETR with ResNet-50, four levels.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", 2021
(https://arxiv.org/abs/2010.04159).
"""

from dn_detr.checkpoint import Detectron2Layout, TorchvisionLayout
from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dab_deformable_detr_r50 import model

from ...modeling import DeformableDetrLayout, HuggingFaceDeformableLayout, PointDecoder

for _half in (model.transformer.encoder, model.transformer.decoder):
    _half.layer.feedforward_dim = 1024
    _half.layer.dropout = 0.1
model.queries.position_kind = "vector"
model.transformer.decoder = L(PointDecoder)(
    layer=model.transformer.decoder.layer,
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
    refine=False,
)
model.heads.shared = True
model.heads.eps = 1e-5
model.criterion.losses.loss_ce.weight = 2.0
model.key_maps = [
    L(DeformableDetrLayout)(shared_heads="${model.heads.shared}"),
    L(HuggingFaceDeformableLayout)(shared_heads="${model.heads.shared}"),
    L(TorchvisionLayout)(),
    L(Detectron2Layout)(),
]
