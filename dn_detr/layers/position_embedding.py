"""Sine embeddings of positions: of the cells of a feature map, and of boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_embed(position: Tensor, num_feats: int, temperature: float = 10000.0) -> Tensor:
    """Interleaved sin and cos of (...) radians at `num_feats` frequencies; (..., num_feats)."""
    pair = torch.arange(num_feats, dtype=torch.float32, device=position.device) // 2
    angle = position[..., None] / temperature ** (2 * pair / num_feats)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Position of each cell within the unpadded image, as sines and cosines.

    Args:
        num_pos_feats: channels for each axis; the result has twice as many, y before x.
        temperature: ratio of the slowest to the fastest wavelength.
        offset: added to the 1-based cell count before it is normalised; -0.5 takes cell centres.
        scale: radians that the image spans.
        eps: guards the division where a column or row holds nothing but padding.

    Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, appendix A.4.
    The published deformable models use temperature 10000 and offset -0.5.
    """

    def __init__(
        self,
        num_pos_feats: int = 128,
        *,
        temperature: float = 10000.0,
        offset: float = 0.0,
        scale: float = 2 * math.pi,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.offset = offset
        self.scale = scale
        self.eps = eps

    def forward(self, mask: Tensor) -> Tensor:
        """Embed a map's cells.

        Args:
            mask: (B, H, W) bool, True = padding, which lies at the bottom and right.

        Returns:
            (B, 2 * num_pos_feats, H, W) float32.
        """
        height, width = mask.shape[1:]
        y = self._embed_axis(mask[:, :, 0])[:, :, None].expand(-1, -1, width, -1)
        x = self._embed_axis(mask[:, 0, :])[:, None].expand(-1, height, -1, -1)
        return torch.cat([y, x], dim=-1).permute(0, 3, 1, 2)

    def _embed_axis(self, mask: Tensor) -> Tensor:
        """(B, length) mask of a row or column -> (B, length, num_pos_feats)."""
        position = (~mask).float().cumsum(1)
        position = (position + self.offset) / (position[:, -1:] + self.eps) * self.scale
        # An axis of nothing but padding divides by eps; zero there is as good and keeps float16.
        return sine_embed(position.masked_fill(mask, 0.0), self.num_pos_feats, self.temperature)


def sine_embed_boxes(
    boxes_cxcywh_norm: Tensor, num_feats: int = 128, *, temperature: float = 10000.0
) -> Tensor:
    """Sine embedding of boxes, or of points, the positional part of a query.

    Args:
        boxes_cxcywh_norm: (..., 4) in [0, 1], or (..., 2) without a size.
        num_feats: channels for each coordinate.

    Returns:
        (..., 4 or 2 * num_feats), coordinates in the order (y, x, w, h).

    Source: Liu et al., "DAB-DETR", 2022, section 4.
    """
    x, y, *size = (boxes_cxcywh_norm * (2 * math.pi)).unbind(-1)
    return torch.cat([sine_embed(c, num_feats, temperature) for c in (y, x, *size)], dim=-1)
