"""What the encoder hands to the decoder: cells of all levels, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dn_detr.structures import may_hold_padding, valid_sizes


@dataclass(frozen=True)
class Levels:
    """Where the cells of L flattened feature maps lie.

    Attributes:
        spatial_shapes: (L, 2) int64 on the CPU, height and width of each padded map.
        level_start_index: (L,) int64 on the CPU, first cell of each level.
        padding_mask: (B, S) bool, True = padding, S cells of all levels.
        valid_ratios: (B, L, 2) float32, share (x, y) of each map that is image, in (0, 1].
        has_padding: False where `padding_mask` is known to be False throughout.
    """

    spatial_shapes: Tensor
    level_start_index: Tensor
    padding_mask: Tensor
    valid_ratios: Tensor
    has_padding: bool = True

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor]) -> Levels:
        """From one (B, H_l, W_l) bool padding mask per level."""
        shapes = torch.tensor([mask.shape[-2:] for mask in masks])
        sizes = shapes.prod(1)
        padded_wh = [(mask.shape[-1], mask.shape[-2]) for mask in masks]
        ratios = [
            valid_sizes(mask) / torch.tensor(wh, device=mask.device, dtype=torch.float32)
            for mask, wh in zip(masks, padded_wh, strict=True)
        ]
        return cls(
            spatial_shapes=shapes,
            level_start_index=sizes.cumsum(0) - sizes,
            padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack(ratios, dim=1),
            has_padding=any(may_hold_padding(mask) for mask in masks),
        )

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, S) bool, True = no query may attend to the cell; None if there is no padding."""
        return self.padding_mask if self.has_padding else None

    @property
    def sizes(self) -> list[int]:
        """Number of cells of each level."""
        return self.spatial_shapes.prod(1).tolist()

    def cell_centres(self) -> Tensor:
        """Centre of each cell, relative to the image; (B, S, 2) as (x, y).

        Cells of the padding lie beyond 1.
        """
        device = self.valid_ratios.device
        centres = []
        for level, (height, width) in enumerate(self.spatial_shapes.tolist()):
            y = (torch.arange(height, device=device) + 0.5) / height
            x = (torch.arange(width, device=device) + 0.5) / width
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
            centres.append(grid / self.valid_ratios[:, level, None])
        return torch.cat(centres, dim=1)

    def to_padded(self, references: Tensor) -> Tensor:
        """From coordinates relative to the image to coordinates relative to each padded map.

        Args:
            references: (B, Q, 2) points or (B, Q, 4) boxes.

        Returns:
            (B, Q, L, 2 or 4).
        """
        ratios = self.valid_ratios.repeat(1, 1, references.shape[-1] // 2)
        return references[:, :, None] * ratios[:, None]


@dataclass(frozen=True)
class Memory:
    """The encoded feature maps.

    Attributes:
        cells: (B, S, C) features of the cells of all levels.
        pos: (B, S, C) their position embeddings, level embedding included.
        levels: their geometry.
    """

    cells: Tensor
    pos: Tensor
    levels: Levels
