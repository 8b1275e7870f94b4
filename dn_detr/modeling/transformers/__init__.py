"""Transformers: feature maps and queries in, one state per query and decoder layer out."""

from __future__ import annotations

from .decoder import BoxDecoder
from .deformable import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
)
from .dense import DenseDecoder, DenseDecoderLayer, DenseEncoder, DenseEncoderLayer
from .levels import Levels, Memory
from .transformer import Transformer

__all__ = [
    "BoxDecoder",
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "DenseDecoder",
    "DenseDecoderLayer",
    "DenseEncoder",
    "DenseEncoderLayer",
    "Levels",
    "Memory",
    "Transformer",
]
