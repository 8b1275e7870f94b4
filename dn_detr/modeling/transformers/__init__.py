"""Transformers: feature maps and queries in, one state per query and decoder layer out."""

from __future__ import annotations

from .decoder import BoxDecoder
from .deformable import DeformableDecoder, DeformableEncoder
from .dense import DenseDecoder, DenseEncoder
from .levels import Levels, Memory
from .transformer import Transformer

__all__ = [
    "BoxDecoder",
    "DeformableDecoder",
    "DeformableEncoder",
    "DenseDecoder",
    "DenseEncoder",
    "Levels",
    "Memory",
    "Transformer",
]
