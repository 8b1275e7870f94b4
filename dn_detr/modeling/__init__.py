"""The detector and its parts, composed in the configs."""

from __future__ import annotations

from .backbones import ResNet, TimmBackbone
from .criterion import DetectionCriterion
from .denoising import NoisedQueries, QueryDenoising
from .detector import Detector, Diagnostics
from .heads import DetectionHeads
from .losses import ObjectCounts, mean_over_ranks
from .matcher import HungarianMatcher, Matching
from .necks import ChannelMapper
from .postprocess import PostProcess
from .queries import AnchorQueries, ProposalQueries, Proposals, Queries
from .transformers import (
    BoxDecoder,
    DeformableDecoder,
    DeformableEncoder,
    DenseDecoder,
    DenseEncoder,
    Memory,
    Transformer,
)

__all__ = [
    "AnchorQueries",
    "BoxDecoder",
    "ChannelMapper",
    "DeformableDecoder",
    "DeformableEncoder",
    "DenseDecoder",
    "DenseEncoder",
    "DetectionCriterion",
    "DetectionHeads",
    "Detector",
    "Diagnostics",
    "HungarianMatcher",
    "Matching",
    "Memory",
    "NoisedQueries",
    "ObjectCounts",
    "PostProcess",
    "ProposalQueries",
    "Proposals",
    "Queries",
    "QueryDenoising",
    "ResNet",
    "TimmBackbone",
    "Transformer",
    "mean_over_ranks",
]
