"""torchvision's v2: normalised pyramid, a deeper proposal network, filters in the box head.

Li et al., "Benchmarking Detection Transfer Learning with Vision Transformers", 2021
(https://arxiv.org/abs/2111.11429).
"""

from .faster_rcnn_r50_fpn import model

model.backbone.batch_norm = "trainable"
model.backbone.pyramid_norm = True
model.rpn_depth = 2
model.box_filters = [256, 256, 256, 256]
model.box_dims = [1024]
