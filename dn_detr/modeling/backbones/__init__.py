"""Backbones: images in, feature maps of several strides out."""

from __future__ import annotations

from .resnet import ResNet, TorchvisionBackbone
from .timm import TimmBackbone

__all__ = ["ResNet", "TimmBackbone", "TorchvisionBackbone"]
