"""Faster R-CNN as a detector of the library, its backbones and the layout of its checkpoints."""

from .backbone import PyramidBackbone
from .detector import FasterRCNN
from .layouts import TorchvisionDetectorLayout

__all__ = ["FasterRCNN", "PyramidBackbone", "TorchvisionDetectorLayout"]
