"""The multi-level neck of Deformable DETR.

Zhu et al., "Deformable DETR", 2021 (https://arxiv.org/abs/2010.04159).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dn_detr.errors import UserError
from dn_detr.layers import MaskedGroupNorm
from dn_detr.structures import downsample_mask, may_hold_padding


class ChannelMapper(nn.Module):
    """Project each backbone map to `out_channels` and add coarser levels.

    Level i < len(in_channels) is a 1x1 convolution of map i; the next level is a 3x3 convolution
    of stride 2 of the *last backbone map*, further ones of the level before. Each is followed by
    group normalisation, if any. With one map and no normalisation it is the input projection of
    the dense models.

    Args:
        in_channels: channels of the backbone's maps, finest first.
        in_strides: their strides in pixels.
        out_channels: channels of every level.
        num_levels: number of levels, at least the number of maps.
        num_groups: groups of the normalisation; None for none.
        mask_padding: normalise over the image only and keep the padding at zero, so that an
            image has the same features alone and in any batch. False is the published behaviour.

    Raises:
        ValueError: fewer levels than maps, or not one stride per map.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        out_channels: int = 256,
        *,
        num_levels: int = 4,
        num_groups: int | None = 32,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        if len(in_channels) != len(in_strides):
            raise ValueError(f"in_channels {in_channels} and in_strides {in_strides}: one per map")
        extra = num_levels - len(in_channels)
        if extra < 0:
            raise ValueError(f"num_levels {num_levels} is less than {len(in_channels)} input maps")
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        for index in range(extra):
            channels = in_channels[-1] if index == 0 else out_channels
            self.convs.append(nn.Conv2d(channels, out_channels, 3, stride=2, padding=1))
        self.norms = nn.ModuleList(
            nn.Identity() if num_groups is None else MaskedGroupNorm(num_groups, out_channels)
            for _ in range(num_levels)
        )
        self.out_strides = [*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(extra))]
        self.in_channels, self.in_strides = list(in_channels), list(in_strides)
        self.mask_padding = mask_padding
        if num_groups is not None:  # published: torch's own initialisation where no norm follows
            for name, parameter in self.convs.named_parameters():
                init = nn.init.xavier_uniform_ if name.endswith("weight") else nn.init.zeros_
                init(parameter)

    def forward(
        self, features: Sequence[Tensor], mask: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Project.

        Args:
            features: one (B, C_i, H_i, W_i) per entry of `in_channels`.
            mask: (B, H, W) bool of the images, True = padding.

        Returns:
            `num_levels` maps (B, out_channels, H_l, W_l) and their masks (B, H_l, W_l).

        Raises:
            UserError: the features are not those of `in_channels` and `in_strides`.
        """
        maps: list[Tensor] = []
        masks = [downsample_mask(mask, stride) for stride in self.out_strides]
        given = [tuple(x.shape[1:]) for x in features]
        sizes = [tuple(m.shape[-2:]) for m in masks[: len(self.in_channels)]]
        expected = [(c, *size) for c, size in zip(self.in_channels, sizes, strict=True)]
        if given != expected:
            raise UserError(
                f"the backbone gives maps (channels, height, width) {given}, but in_channels "
                f"{self.in_channels} and in_strides {self.in_strides} of the neck mean {expected}; "
                "set model.neck.in_channels and model.neck.in_strides"
            )
        masked = self.mask_padding and may_hold_padding(mask)
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if level < len(features):
                source, source_mask = features[level], masks[level]
            elif level == len(features):
                source, source_mask = features[-1], masks[level - 1]
            else:
                source, source_mask = maps[-1], masks[level - 1]
            if masked:
                source = source.masked_fill(source_mask[:, None], 0.0)
            projected = conv(source)
            if isinstance(norm, MaskedGroupNorm):
                projected = norm(projected, masks[level] if masked else None)
            maps.append(projected)
        return maps, masks
