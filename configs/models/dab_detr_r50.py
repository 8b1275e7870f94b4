"""DAB-DETR with ResNet-50: dense attention over one map, boxes as queries.

Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", 2022
(https://arxiv.org/abs/2201.12329). 43 668 690 parameters with 80 classes.
"""

from dn_detr.config import LazyCall as L
from dn_detr.layers import PositionEmbeddingSine
from dn_detr.modeling import (
    AnchorQueries,
    ChannelMapper,
    DetectionHeads,
    Detector,
    PostProcess,
    Transformer,
)
from dn_detr.modeling.transformers import (
    DenseDecoder,
    DenseDecoderLayer,
    DenseEncoder,
    DenseEncoderLayer,
)

from .parts import backbone, classification, criterion, key_maps

_layer = dict(
    embed_dim="${model.transformer.embed_dim}",
    num_heads=8,
    feedforward_dim=2048,
    dropout=0.0,
    activation="prelu",
    _partial_=True,  # makes each of the layers
)
model = L(Detector)(
    num_classes=80,
    num_queries=300,
    num_patterns=0,
    classification=classification,
    key_maps=key_maps,
    backbone=backbone,
    neck=L(ChannelMapper)(
        in_channels=[2048],
        in_strides=[32],
        out_channels="${model.transformer.embed_dim}",
        num_levels=1,
        num_groups=None,
    ),
    position_embedding=L(PositionEmbeddingSine)(num_pos_feats=128, temperature=20, offset=0.0),
    queries=L(AnchorQueries)(
        num_queries="${model.num_queries}",
        num_patterns="${model.num_patterns}",
        embed_dim="${model.transformer.embed_dim}",
        content="zero",
        indicator=False,
    ),
    transformer=L(Transformer)(
        embed_dim=256,
        num_levels="${model.neck.num_levels}",
        encoder=L(DenseEncoder)(
            layer=L(DenseEncoderLayer)(**_layer),
            num_layers=6,
            embed_dim="${model.transformer.embed_dim}",
            query_scale=True,
        ),
        decoder=L(DenseDecoder)(
            layer=L(DenseDecoderLayer)(num_levels="${model.neck.num_levels}", **_layer),
            num_layers=6,
            embed_dim="${model.transformer.embed_dim}",
            final_norm=True,
            look_forward_twice=True,
            query_scale=True,
        ),
    ),
    heads=L(DetectionHeads)(
        num_classes="${model.num_classes}",
        embed_dim="${model.transformer.embed_dim}",
        num_layers="${model.transformer.decoder.num_layers}",
        shared=True,
        size_bias=0.0,
        classification="${model.classification}",
    ),
    denoising=None,
    criterion=criterion,
    postprocess=L(PostProcess)(num_select=300, classification="${model.classification}"),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)
