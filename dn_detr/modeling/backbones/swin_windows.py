"""Window attention of timm's Swin Transformer, exact for images of any size.

Liu et al., "Swin Transformer", 2021 (https://arxiv.org/abs/2103.14030), section 3.2. Windows tile
the map from the top left corner; in every other block they are shifted by half a window, and the
rows and columns that wrap around are kept apart by a mask. Maps that windows do not tile are padded
*before* the shift, as the paper's detectors do; timm pads after it, which puts cells from opposite
borders of the map into one window without a mask between them.

Where the padding of the images is known, no cell attends to padding, be it that of the batch or
that of the last windows: an image has the same features alone and in any batch. The paper's
detectors let cells attend to both; `mask_padding=False` of the backbone does so too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    SwinTransformerStage,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .padding import current_padding, zero_padding_before_channels_last


def keep_windows_from_padding(stages: Iterable[tuple[nn.Module, int]]) -> None:
    """Give the stages of a Swin Transformer this module's attention; parameters keep their names.

    Args:
        stages: timm's `SwinTransformerStage`, each with the stride of its output.
    """
    for stage, stride in stages:
        assert isinstance(stage, SwinTransformerStage)
        if isinstance(stage.downsample, PatchMerging):
            zero_padding_before_channels_last([(stage.downsample, stride // 2)])
        for block in stage.blocks:
            block.__class__ = _ExactWindowBlock
            cast(_ExactWindowBlock, block).stride = stride


class _ExactWindowBlock(SwinTransformerBlock):
    """timm's block with another `_attn`; blocks become one by assignment of the class."""

    stride: int

    def _attn(self, x_BHWC: Tensor) -> Tensor:
        """Attention in (shifted) windows; (B, H, W, C) to the same shape."""
        height, width = x_BHWC.shape[1:3]
        rows, columns = -height % self.window_size[0], -width % self.window_size[1]
        shift = (-self.shift_size[0], -self.shift_size[1])
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns, 0, rows)).roll(shift, dims=(1, 2))
        padded_height, padded_width = x_BHWC.shape[1:3]
        windows_NAC = window_partition(x_BHWC, self.window_size).flatten(1, 2)
        mask_NAA = self._window_mask(x_BHWC, height, width)
        windows_NAC = self.attn(windows_NAC, mask=mask_NAA)
        windows = windows_NAC.unflatten(1, self.window_size)
        x_BHWC = window_reverse(windows, self.window_size, padded_height, padded_width)
        x_BHWC = x_BHWC.roll(self.shift_size, dims=(1, 2))
        return x_BHWC[:, :height, :width]

    def _window_mask(self, x_BHWC: Tensor, height: int, width: int) -> Tensor | None:
        """What is added to the attention weights: 0, or minus infinity between cells kept apart.

        Args:
            x_BHWC: the padded and shifted map.
            height: of the map before it was padded.
            width: as `height`.

        Returns:
            (B * windows of an image, A, A), or (windows of an image, A, A) where the padding of
            the images is not known, with A the cells of a window; None if nothing is kept apart.
        """
        padding = current_padding()
        if padding is None:
            return self._compute_mask(x_BHWC, None) if any(self.shift_size) else None

        def compute() -> Tensor:
            valid = padding.valid(self.stride, height, width)
            return self._compute_mask(x_BHWC, valid)

        key = ("windows", self.stride, self.window_size, self.shift_size, x_BHWC.dtype)
        return padding.derive(key, compute)

    def _compute_mask(self, x_BHWC: Tensor, valid: Tensor | None) -> Tensor:
        height, width = x_BHWC.shape[1:3]
        # Cells attend to those of the same label: one per part of the map that the shift has
        # brought together, and one for padding, which attends to itself so that no softmax is
        # over nothing.
        label = 3 * self._parts(0, height, x_BHWC)[:, None] + self._parts(1, width, x_BHWC)
        label = label[None, :, :, None]  # (1, H, W, 1)
        if valid is not None:
            pad = (0, width - valid.shape[2], 0, height - valid.shape[1])
            valid = F.pad(valid, pad, value=False)
            valid = valid.roll((-self.shift_size[0], -self.shift_size[1]), dims=(1, 2))
            label = torch.where(valid[..., None], label, -1)  # (B, H, W, 1)
        label = window_partition(label, self.window_size).flatten(1)
        apart = label[:, None, :] != label[:, :, None]
        return x_BHWC.new_zeros(apart.shape).masked_fill(apart, -torch.inf)

    def _parts(self, axis: int, size: int, x: Tensor) -> Tensor:
        """(size,) which of three parts a row (axis 0) or column of the shifted map belongs to."""
        index = torch.arange(size, device=x.device)
        window, shift = self.window_size[axis], self.shift_size[axis]
        if not shift:
            return torch.zeros_like(index)
        return (index >= size - window).long() + (index >= size - shift).long()
