"""Batches of images of different sizes: padding at the bottom and right, and its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images of different sizes, with zeros at the bottom and right of the smaller ones.

    Args:
        images: B tensors (C, h, w) of one dtype and device.

    Returns:
        batch (B, C, H, W) with H, W the largest h and w; mask (B, H, W) bool, True = padding.
    """
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for row, image in enumerate(images):
        h, w = image.shape[-2:]
        batch[row, :, :h, :w] = image
        mask[row, :h, :w] = False
    return batch, mask


def downsample_mask(mask: Tensor, stride: int) -> Tensor:
    """Padding mask of a feature map whose cells are `stride` pixels apart.

    A convolution of stride s over h rows gives ceil(h / s) rows, whatever is padded below them.
    Taking every s-th pixel keeps exactly these, so an image has the same valid cells alone and
    in any batch. (Nearest interpolation to the padded size, as the reference code does, agrees
    when the padded size is a multiple of s and drifts by a cell when it is not.)

    Args:
        mask: (B, H, W) bool, True = padding.
        stride: pixels per cell.

    Returns:
        (B, ceil(H / stride), ceil(W / stride)) bool.
    """
    return mask[:, ::stride, ::stride]


def valid_sizes(mask: Tensor) -> Tensor:
    """Unpadded (width, height) of each image of a (B, H, W) mask; (B, 2) float32, in cells."""
    valid = ~mask
    return torch.stack([valid[:, 0, :].sum(1), valid[:, :, 0].sum(1)], dim=-1).float()


def may_hold_padding(mask: Tensor) -> bool:
    """Return False if the mask is known to hold no padding (checked on CPU only).

    On an accelerator the check would wait for the device, and a traced graph must serve all masks.

    Args:
        mask: (B, H, W) bool, True = padding.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return bool(mask.any())
