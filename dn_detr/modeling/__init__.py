"""The detector and its parts, composed in the configs."""

from __future__ import annotations

from .backbones import ResNet
from .criterion import DetectionCriterion
from .denoising import NoisedQueries, QueryDenoising
from .detector import Detector
from .heads import DetectionHeads
from .matcher import HungarianMatcher, Matching
from .necks import ChannelMapper
from .postprocess import PostProcess
from .queries import AnchorQueries
from .transformers import DeformableDecoder, DeformableEncoder, DeformableTransformer

__all__ = [
    "AnchorQueries",
    "ChannelMapper",
    "DeformableDecoder",
    "DeformableEncoder",
    "DeformableTransformer",
    "DetectionCriterion",
    "DetectionHeads",
    "Detector",
    "HungarianMatcher",
    "Matching",
    "NoisedQueries",
    "PostProcess",
    "QueryDenoising",
    "ResNet",
]
