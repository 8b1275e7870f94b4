"""Transformers: feature maps and queries in, one state per query and decoder layer out."""

from __future__ import annotations

from .decoder import BoxDecoder as BoxDecoder
from .decoder import Decoder as Decoder
from .decoder import DecoderLayer as DecoderLayer
from .decoder import boxes_of_points as boxes_of_points
from .deformable import DeformableDecoder as DeformableDecoder
from .deformable import DeformableDecoderLayer as DeformableDecoderLayer
from .deformable import DeformableEncoder as DeformableEncoder
from .deformable import DeformableEncoderLayer as DeformableEncoderLayer
from .dense import DenseDecoder as DenseDecoder
from .dense import DenseDecoderLayer as DenseDecoderLayer
from .dense import DenseEncoder as DenseEncoder
from .dense import DenseEncoderLayer as DenseEncoderLayer
from .levels import Levels as Levels
from .levels import Memory as Memory
from .transformer import Transformer as Transformer
