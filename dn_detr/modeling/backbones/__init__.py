"""Backbones: images in, feature maps of several strides out."""

from __future__ import annotations

from .resnet import ResNet

__all__ = ["ResNet"]
