"""Handwritten digits (`tools/make_digits.py`), and what lets a model learn them on a laptop CPU."""

from typing import Any

from dn_detr.config import LazyCall as L
from dn_detr.engine import cosine

from .coco import dataloader
from .optimizer import optimizer
from .train import train

dataloader.root = "datasets/digits"
# Mirrored digits are no digits, and the scenes are small already.
dataloader.train.dataset.transforms.short_sides = [128]
dataloader.train.dataset.transforms.max_size = 128
dataloader.train.dataset.transforms.flip_probability = 0.0
dataloader.train.dataset.transforms.crop_probability = 0.0
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.dataset.transforms.short_side = 128
dataloader.test.dataset.transforms.max_size = 128
dataloader.test.batch_size = 8
dataloader.test.num_workers = 1

optimizer.lr = 8e-4
optimizer.params.lr_factors = {}
lr_schedule = L(cosine)(final_factor=0.02, warmup_epochs=0.2)
train.epochs = 5
train.eval_period = "1ep"
train.checkpoint.period = "1ep"
train.clip_grad.max_norm = 1.0


def make_small(model: Any) -> None:
    """Let a model of ten classes have a ResNet-18 without its last stage, and 2 + 3 narrow layers.

    Batch normalisation is trainable, because nothing is pretrained. A model of several levels has
    three, one of a single level that of stride 16.
    """
    several = model.neck.num_levels > 1
    model.num_classes = 10
    model.num_queries = 30
    model.backbone.name = "resnet18"
    model.backbone.out_features = ["layer2", "layer3"] if several else ["layer3"]
    model.backbone.frozen_stages = 0
    model.backbone.batch_norm = "trainable"
    model.backbone.weights = None
    model.neck.in_channels = [128, 256] if several else [256]
    model.neck.in_strides = [8, 16] if several else [16]
    model.neck.num_levels = 3 if several else 1
    if "num_pos_feats" in model.position_embedding:
        model.position_embedding.num_pos_feats = 64
    model.transformer.embed_dim = 128
    for half, num_layers in ((model.transformer.encoder, 2), (model.transformer.decoder, 3)):
        half.num_layers = num_layers
        half.layer.num_heads = 4
        half.layer.feedforward_dim = 512
