"""Building blocks of the transformers."""

from __future__ import annotations

from .activation_checkpointing import run_checkpointed
from .attention import MultiheadAttention, attend
from .deformable_attention import MSDeformAttn
from .linear import Linear
from .mlp import MLP, FeedForward
from .norm import MaskedGroupNorm
from .position_embedding import PositionEmbeddingSine, sine_embed, sine_embed_boxes

__all__ = [
    "MLP",
    "FeedForward",
    "Linear",
    "MSDeformAttn",
    "MaskedGroupNorm",
    "MultiheadAttention",
    "PositionEmbeddingSine",
    "attend",
    "run_checkpointed",
    "sine_embed",
    "sine_embed_boxes",
]
