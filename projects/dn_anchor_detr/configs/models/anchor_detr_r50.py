"""Anchor DETR with ResNet-50. 37 038 711 parameters with 91 classes, COCO's category ids.

Wang et al., "Anchor DETR: Query Design for Transformer-Based Object Detection", 2022
(https://arxiv.org/abs/2109.07107).
"""

from dn_detr.checkpoint import Detectron2Layout, TorchvisionLayout
from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dab_detr_r50 import model
from dn_detr.modeling.transformers import DeformableEncoder

from ...modeling import (
    AnchorDetrLayout,
    CellCentres,
    PointDecoder,
    PointDecoderLayer,
    PointQueries,
    PointTransformer,
    RowColumnEncoderLayer,
)

_layer = dict(
    embed_dim="${model.transformer.embed_dim}",
    num_heads=8,
    feedforward_dim=1024,
    mask_padding=True,
    _partial_=True,  # makes each of the layers
)
model.num_patterns = 3
model.neck.num_groups = 32
model.position_embedding = L(CellCentres)()
model.queries = L(PointQueries)(
    num_queries="${model.num_queries}",
    num_patterns="${model.num_patterns}",
    embed_dim="${model.transformer.embed_dim}",
    content="zero",
    indicator=False,
    position_kind="point",
)
model.transformer = L(PointTransformer)(
    embed_dim=256,
    num_levels=1,
    encoder=L(DeformableEncoder)(layer=L(RowColumnEncoderLayer)(**_layer), num_layers=6),
    decoder=L(PointDecoder)(
        layer=L(PointDecoderLayer)(**_layer),
        num_layers=6,
        embed_dim="${model.transformer.embed_dim}",
    ),
)
model.heads.size_bias = -2.0
model.heads.eps = 1e-5
model.criterion.losses.loss_ce.weight = 2.0
model.postprocess.num_select = 100
model.key_maps = [L(AnchorDetrLayout)(), L(TorchvisionLayout)(), L(Detectron2Layout)()]
