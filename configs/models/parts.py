"""What all models of the family have in common."""

from dn_detr.config import LazyCall as L
from dn_detr.modeling import DetectionCriterion, HungarianMatcher, QueryDenoising, ResNet

backbone = L(ResNet)(
    name="resnet50",
    out_features=["layer4"],
    frozen_stages=2,
    dilation=False,  # True: "DC5", the last stage with stride 16
    batch_norm="frozen",
    weights="IMAGENET1K_V1",
    mask_padding=True,
)
criterion = L(DetectionCriterion)(
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
)
denoising = L(QueryDenoising)(
    num_classes="${model.num_classes}",
    embed_dim="${model.transformer.embed_dim}",
    num_groups=5,
    label_noise=0.2,
    box_noise=0.4,
    max_queries=500,
    indicator="${model.queries.indicator}",
    no_object_label=True,
    mask_empty_slots=True,
    weights="${model.criterion.weights}",
    alpha="${model.criterion.alpha}",
    gamma="${model.criterion.gamma}",
)
