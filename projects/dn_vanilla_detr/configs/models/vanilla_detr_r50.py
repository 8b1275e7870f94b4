"""DETR with ResNet-50. 41 524 768 parameters with 91 classes, COCO's category ids.

Carion et al., "End-to-End Object Detection with Transformers", 2020
(https://arxiv.org/abs/2005.12872).
"""

from dn_detr.checkpoint import Detectron2Layout, HuggingFaceLayout, TorchvisionLayout
from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dab_detr_r50 import model
from dn_detr.modeling import SoftmaxClassification

from ...modeling import AbsoluteHeads, DetrLayout, VectorDecoder, VectorDecoderLayer

model.num_queries = 100
model.classification = L(SoftmaxClassification)(no_object_weight=0.1)
model.position_embedding.temperature = 10000
model.queries.position_kind = "vector"
model.transformer.encoder.query_scale = False
model.transformer.encoder.layer.activation = "relu"
model.transformer.encoder.layer.dropout = 0.1
model.transformer.decoder = L(VectorDecoder)(
    layer=L(VectorDecoderLayer)(
        embed_dim="${model.transformer.embed_dim}",
        num_heads=8,
        feedforward_dim=2048,
        dropout=0.1,
        _partial_=True,  # makes each of the layers
    ),
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
)
model.heads = L(AbsoluteHeads)(
    num_classes="${model.num_classes}",
    embed_dim="${model.transformer.embed_dim}",
    num_layers="${model.transformer.decoder.num_layers}",
    classification="${model.classification}",
)
model.criterion.matcher.costs.cost_class.weight = 1.0
model.postprocess.num_select = "${model.num_queries}"
model.key_maps = [
    L(DetrLayout)(),
    L(HuggingFaceLayout)(),
    L(TorchvisionLayout)(),
    L(Detectron2Layout)(),
]
