"""What Conditional DETR has and the library has not: queries that look from points that stay."""

from .decoder import ConditionalDecoder
from .layouts import ConditionalDetrLayout, HuggingFaceConditionalLayout

__all__ = ["ConditionalDecoder", "ConditionalDetrLayout", "HuggingFaceConditionalLayout"]
