"""The detector and its parts, composed in the configs."""

from __future__ import annotations

from . import inputs
from .backbones import ResNet, TimmBackbone, TorchvisionBackbone
from .classification import (
    NOTHING,
    Classification,
    FocalClassification,
    SoftmaxClassification,
)
from .criterion import DetectionCriterion, ObjectCounts, mean_over_ranks
from .denoising import Noise, NoisedBoxes, NoisedQueries, QueryDenoising
from .detector import Detector, Diagnostics
from .heads import DetectionHeads
from .losses import BoxGIoULoss, BoxL1Loss, ClassificationLoss, LossTerm
from .matcher import BoxGIoUCost, BoxL1Cost, ClassificationCost, HungarianMatcher, MatchingCost
from .necks import ChannelMapper
from .pairs import Outputs, Pairs, Targets, pad_targets
from .postprocess import PostProcess
from .queries import (
    AnchorQueries,
    BoxQueryEmbedding,
    PositionKind,
    ProposalQueries,
    Proposals,
    Queries,
)
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
    "NOTHING",
    "AnchorQueries",
    "BoxDecoder",
    "BoxGIoUCost",
    "BoxGIoULoss",
    "BoxL1Cost",
    "BoxL1Loss",
    "BoxQueryEmbedding",
    "ChannelMapper",
    "Classification",
    "ClassificationCost",
    "ClassificationLoss",
    "DeformableDecoder",
    "DeformableEncoder",
    "DenseDecoder",
    "DenseEncoder",
    "DetectionCriterion",
    "DetectionHeads",
    "Detector",
    "Diagnostics",
    "FocalClassification",
    "HungarianMatcher",
    "LossTerm",
    "MatchingCost",
    "Memory",
    "Noise",
    "NoisedBoxes",
    "NoisedQueries",
    "ObjectCounts",
    "Outputs",
    "Pairs",
    "PositionKind",
    "PostProcess",
    "ProposalQueries",
    "Proposals",
    "Queries",
    "QueryDenoising",
    "ResNet",
    "SoftmaxClassification",
    "Targets",
    "TimmBackbone",
    "TorchvisionBackbone",
    "Transformer",
    "inputs",
    "mean_over_ranks",
    "pad_targets",
]
