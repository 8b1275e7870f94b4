"""Normalisation that does not see padding."""

from __future__ import annotations

from torch import Tensor, nn

from dn_detr.structures import at_least_float32


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics leave padded cells out.

    With plain `GroupNorm` the features of an image depend on how much padding its batch adds.
    Without a mask this is `nn.GroupNorm`, and its parameters have the same names.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            input: (B, C, H, W).
            mask: (B, H, W) bool, True = padding, or None for none.

        Returns:
            (B, C, H, W); the values of padded cells are meaningless.
        """
        if mask is None:
            return super().forward(input)
        batch, channels, height, width = input.shape
        grouped = at_least_float32(input).reshape(batch, self.num_groups, -1, height, width)
        keep = (~mask)[:, None, None].to(grouped.dtype)  # (B, 1, 1, H, W)
        count = keep.sum((2, 3, 4), keepdim=True) * (channels // self.num_groups)
        mean = (grouped * keep).sum((2, 3, 4), keepdim=True) / count
        centred = grouped - mean
        variance = (centred.square() * keep).sum((2, 3, 4), keepdim=True) / count
        normed = (centred * (variance + self.eps).rsqrt()).reshape(input.shape)
        out = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)
