"""Backbones: images in, feature maps of several strides out."""

from __future__ import annotations

from .resnet import ResNet as ResNet
from .resnet import TorchvisionBackbone as TorchvisionBackbone
from .timm import TimmBackbone as TimmBackbone
