"""What DETR has and the library has not: positions that are vectors, boxes without a reference."""

from .decoder import VectorDecoder, VectorDecoderLayer
from .heads import AbsoluteHeads
from .layouts import DetrLayout, HuggingFaceDetrLayout
from .queries import VectorQueries, VectorQueryEmbedding

__all__ = [
    "AbsoluteHeads",
    "DetrLayout",
    "HuggingFaceDetrLayout",
    "VectorDecoder",
    "VectorDecoderLayer",
    "VectorQueries",
    "VectorQueryEmbedding",
]
