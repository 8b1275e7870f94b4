"""Faster R-CNN with ResNet-50 and a feature pyramid, as torchvision builds it."""

from dn_detr.checkpoint import TorchvisionLayout
from dn_detr.config import LazyCall as L

from ...modeling import FasterRCNN, PyramidBackbone, TorchvisionDetectorLayout

model = L(FasterRCNN)(
    backbone=L(PyramidBackbone)(
        name="resnet50",
        returned_layers=None,
        trainable_layers=3,
        weights="IMAGENET1K_V1",
        batch_norm="frozen",
        norm_eps=1e-5,  # 0: torchvision's COCO weights of fasterrcnn_resnet50_fpn
        pyramid_norm=False,
    ),
    denoising=None,
    num_classes=80,
    anchor_sizes=[[32], [64], [128], [256], [512]],
    rpn_depth=1,
    box_filters=[],
    box_dims=[1024, 1024],
    denoise_classes=False,
    denoising_weight=1.0,
    key_maps=[L(TorchvisionDetectorLayout)(), L(TorchvisionLayout)()],
)
