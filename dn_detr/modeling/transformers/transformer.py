"""Encoder and decoder around one memory, common to all transformers of the family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dn_detr.layers import MSDeformAttn

from .levels import Levels, Memory


class Transformer(nn.Module):
    """Encoder and decoder; a config chooses them.

    ========================  ==================  ================
    model                     encoder             decoder
    ========================  ==================  ================
    DAB-DETR, DN-DETR         DenseEncoder        DenseDecoder
    DAB-, DN-Deformable-DETR  DeformableEncoder   DeformableDecoder
    deformable encoder only   DeformableEncoder   DenseDecoder
    ========================  ==================  ================

    Args:
        encoder: called with cells (B, S, C), their positions (B, S, C) and `Levels`.
        decoder: a `BoxDecoder` or anything called like it; the detector calls it.
        embed_dim: C.
        num_levels: L feature levels; with more than one, each has a learned embedding that is
            added to the positions of its cells.

    All matrices start from Xavier's distribution, whatever their modules chose.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, embed_dim: int = 256, num_levels: int = 4
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.level_embed = (
            nn.Parameter(torch.empty(num_levels, embed_dim)) if num_levels > 1 else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier everywhere, then deformable attention's own initialisation."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if self.level_embed is not None:
            nn.init.normal_(self.level_embed)

    def encode(
        self, maps: Sequence[Tensor], masks: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> Memory:
        """Flatten and encode the maps.

        Args:
            maps: L maps (B, C, H_l, W_l).
            masks: L masks (B, H_l, W_l) bool, True = padding.
            positions: L position embeddings (B, C, H_l, W_l).
        """
        levels = Levels.from_masks(masks)
        cells = torch.cat([_to_cells(m) for m in maps], dim=1)
        flat = [_to_cells(p) for p in positions]
        if self.level_embed is not None:
            flat = [p + e for p, e in zip(flat, self.level_embed, strict=True)]
        # Embeddings are computed in float32; a model in float64 is one throughout.
        pos = torch.cat(flat, dim=1).to(next(self.parameters()).dtype)
        return Memory(self.encoder(cells, pos, levels), pos, levels)


def _to_cells(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return feature_map.flatten(2).transpose(1, 2)
