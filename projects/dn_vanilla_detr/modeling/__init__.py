"""What DETR has and the library has not: boxes without a reference."""

from .decoder import VectorDecoder, VectorDecoderLayer
from .heads import AbsoluteHeads
from .layouts import DetrLayout

__all__ = ["AbsoluteHeads", "DetrLayout", "VectorDecoder", "VectorDecoderLayer"]
