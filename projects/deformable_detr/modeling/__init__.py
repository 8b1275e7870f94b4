"""What Deformable DETR has and the library has not: queries without boxes of their own."""

from .decoder import BoxEmbeddingDecoder, PointDecoder
from .layouts import DeformableDetrLayout, HuggingFaceDeformableLayout

__all__ = [
    "BoxEmbeddingDecoder",
    "DeformableDetrLayout",
    "HuggingFaceDeformableLayout",
    "PointDecoder",
]
