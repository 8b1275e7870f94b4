"""Transformers: feature maps and queries in, one state per query and decoder layer out."""

from __future__ import annotations

from .deformable import (
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    DeformableTransformer,
)
from .levels import Levels

__all__ = [
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "DeformableTransformer",
    "Levels",
]
