"""Building blocks of the transformers."""

from __future__ import annotations

from .activation_checkpointing import run_checkpointed as run_checkpointed
from .attention import MultiheadAttention as MultiheadAttention
from .attention import attend as attend
from .deformable_attention import MSDeformAttn as MSDeformAttn
from .linear import Linear as Linear
from .mlp import MLP as MLP
from .mlp import FeedForward as FeedForward
from .norm import MaskedGroupNorm as MaskedGroupNorm
from .position_embedding import PositionEmbeddingSine as PositionEmbeddingSine
from .position_embedding import sine_embed as sine_embed
from .position_embedding import sine_embed_boxes as sine_embed_boxes
