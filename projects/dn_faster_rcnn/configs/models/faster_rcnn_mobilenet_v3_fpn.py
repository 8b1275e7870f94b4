"""torchvision's Faster R-CNN with MobileNetV3-Large: three maps, all sizes of anchors on each."""

from .faster_rcnn_r50_fpn import model

model.backbone.name = "mobilenet_v3_large"
model.anchor_sizes = [[32, 64, 128, 256, 512]] * 3
model.rpn_score_thresh = 0.05
