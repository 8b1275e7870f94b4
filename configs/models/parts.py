"""What all models of the family have in common."""

from dn_detr.checkpoint import (
    Detectron2Layout,
    DetrexLayout,
    HuggingFaceLayout,
    OfficialLayout,
    TorchvisionLayout,
)
from dn_detr.config import LazyCall as L
from dn_detr.modeling import (
    BoxGIoUCost,
    BoxGIoULoss,
    BoxL1Cost,
    BoxL1Loss,
    BoxQueryEmbedding,
    ClassificationCost,
    ClassificationLoss,
    DetectionCriterion,
    FocalClassification,
    HungarianMatcher,
    QueryDenoising,
    ResNet,
)

backbone = L(ResNet)(
    name="resnet50",
    out_features=["layer4"],
    frozen_stages=2,
    dilation=False,  # True: "DC5", the last stage with stride 16
    batch_norm="frozen",
    weights="IMAGENET1K_V1",
    mask_padding=True,
)
classification = L(FocalClassification)(alpha=0.25, gamma=2.0)
criterion = L(DetectionCriterion)(
    matcher=L(HungarianMatcher)(
        costs=dict(
            cost_class=L(ClassificationCost)(classification="${model.classification}", weight=2.0),
            cost_bbox=L(BoxL1Cost)(weight=5.0),
            cost_giou=L(BoxGIoUCost)(weight=2.0),
        ),
    ),
    losses=dict(
        loss_ce=L(ClassificationLoss)(classification="${model.classification}", weight=1.0),
        loss_bbox=L(BoxL1Loss)(weight=5.0),
        loss_giou=L(BoxGIoULoss)(weight=2.0),
    ),
)
denoising = L(QueryDenoising)(
    num_classes="${model.num_classes}",
    embed=L(BoxQueryEmbedding)(
        num_classes="${model.num_classes}",
        embed_dim="${model.transformer.embed_dim}",
        indicator="${model.queries.indicator}",
        no_object_label=True,
    ),
    num_groups=5,
    label_noise=0.2,
    box_noise=0.4,
    max_queries=500,
    mask_empty_slots=True,
)
key_maps = [  # code bases whose checkpoints load
    L(OfficialLayout)(),
    L(DetrexLayout)(),
    L(HuggingFaceLayout)(),
    L(TorchvisionLayout)(),
    L(Detectron2Layout)(),
]
