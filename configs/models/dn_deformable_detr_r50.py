"""DN-Deformable-DETR with ResNet-50.

Li et al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305), on Deformable DETR with 4-d anchors.
47 409 387 parameters with 80 classes.
"""

from dn_detr.config import LazyCall as L
from dn_detr.layers import PositionEmbeddingSine
from dn_detr.modeling import (
    AnchorQueries,
    ChannelMapper,
    DeformableDecoder,
    DeformableEncoder,
    DeformableTransformer,
    DetectionCriterion,
    DetectionHeads,
    Detector,
    HungarianMatcher,
    PostProcess,
    QueryDenoising,
    ResNet,
)

model = L(Detector)(
    num_classes=80,
    num_queries=300,
    backbone=L(ResNet)(
        name="resnet50",
        out_features=["layer2", "layer3", "layer4"],
        frozen_stages=2,
        batch_norm="frozen",
        weights="IMAGENET1K_V1",
        mask_padding=True,
    ),
    neck=L(ChannelMapper)(
        in_channels=[512, 1024, 2048],
        in_strides=[8, 16, 32],
        out_channels="${model.transformer.embed_dim}",
        num_levels=4,
        mask_padding=True,
    ),
    position_embedding=L(PositionEmbeddingSine)(num_pos_feats=128, temperature=10000, offset=-0.5),
    queries=L(AnchorQueries)(
        num_queries="${model.num_queries}",
        embed_dim="${model.transformer.embed_dim}",
        indicator=True,
    ),
    transformer=L(DeformableTransformer)(
        embed_dim=256,
        num_levels="${model.neck.num_levels}",
        encoder=L(DeformableEncoder)(
            num_layers=6,
            embed_dim="${model.transformer.embed_dim}",
            num_heads=8,
            feedforward_dim=2048,
            num_levels="${model.neck.num_levels}",
            num_points=4,
            dropout=0.0,
        ),
        decoder=L(DeformableDecoder)(
            num_layers=6,
            embed_dim="${model.transformer.embed_dim}",
            num_heads=8,
            feedforward_dim=2048,
            num_levels="${model.neck.num_levels}",
            num_points=4,
            dropout=0.0,
            padded_query_pos=False,
        ),
    ),
    heads=L(DetectionHeads)(
        num_classes="${model.num_classes}",
        embed_dim="${model.transformer.embed_dim}",
        num_layers="${model.transformer.decoder.num_layers}",
    ),
    denoising=L(QueryDenoising)(
        num_classes="${model.num_classes}",
        embed_dim="${model.transformer.embed_dim}",
        num_groups=5,
        label_noise=0.2,
        box_noise=0.4,
        max_queries=500,
        indicator="${model.queries.indicator}",
        mask_empty_slots=True,
        weights="${model.criterion.weights}",
        alpha="${model.criterion.alpha}",
        gamma="${model.criterion.gamma}",
    ),
    criterion=L(DetectionCriterion)(
        matcher=L(HungarianMatcher)(
            cost_class=2.0,
            cost_bbox=5.0,
            cost_giou=2.0,
            alpha="${model.criterion.alpha}",
            gamma="${model.criterion.gamma}",
        ),
        weights=dict(loss_ce=1.0, loss_bbox=5.0, loss_giou=2.0),
        alpha=0.25,
        gamma=2.0,
    ),
    postprocess=L(PostProcess)(num_select=100),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)
