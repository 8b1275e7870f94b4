"""DINO with ResNet-50, five scales: the map of stride 4 too."""

from .dino_r50 import model

model.backbone.out_features = ["layer1", "layer2", "layer3", "layer4"]
model.neck.in_channels = [256, 512, 1024, 2048]
model.neck.in_strides = [4, 8, 16, 32]
model.neck.num_levels = 5
