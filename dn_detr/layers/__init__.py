"""Building blocks of the transformers."""

from __future__ import annotations

from .attention import MultiheadAttention, attend
from .deformable_attention import MSDeformAttn
from .linear import Linear
from .mlp import MLP, FeedForward
from .norm import MaskedGroupNorm
from .position_embedding import PositionEmbeddingSine, sine_embed_boxes
from .recompute import choose_recomputation, run_part

__all__ = [
    "MLP",
    "FeedForward",
    "Linear",
    "MSDeformAttn",
    "MaskedGroupNorm",
    "MultiheadAttention",
    "PositionEmbeddingSine",
    "attend",
    "choose_recomputation",
    "run_part",
    "sine_embed_boxes",
]
