"""A Faster R-CNN for the digits, and how to train it on a laptop CPU."""

from typing import Any

from dn_detr.configs.common.digits import dataloader, lr_schedule, train

from .detection import optimizer

optimizer.lr = 0.02
train.clip_grad.max_norm = 10.0  # the boxes of small digits have large gradients


def make_small(model: Any) -> None:
    """Let a model of ten classes have two stages of a ResNet-18, small heads, and fewer regions."""
    model.num_classes = 10
    model.backbone.name = "resnet18"
    model.backbone.returned_layers = [2, 3]
    model.backbone.trainable_layers = 5
    model.backbone.weights = None
    model.backbone.batch_norm = "trainable"  # nothing is pretrained
    model.anchor_sizes = [[16, 24], [32, 48], [64, 96]]
    model.box_dims = [256, 256]
    model.box_batch_size_per_image = 32
    model.rpn_pre_nms_top_n_train = model.rpn_post_nms_top_n_train = 300
    model.rpn_pre_nms_top_n_test = model.rpn_post_nms_top_n_test = 100
