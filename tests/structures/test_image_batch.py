"""Padding and its mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dn_detr.structures import downsample_mask, pad_images, valid_sizes


def test_padding_is_zero_and_marked():
    small, large = torch.ones(3, 2, 5), torch.ones(3, 4, 3)
    batch, mask = pad_images([small, large])
    assert batch.shape == (2, 3, 4, 5)
    assert torch.equal(batch, (~mask)[:, None].expand_as(batch).float())
    assert valid_sizes(mask).tolist() == [[5, 2], [3, 4]]


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 100])
def test_an_image_has_the_valid_cells_that_a_convolution_gives_it_alone(size, stride):
    _, mask = pad_images([torch.zeros(1, size, size), torch.zeros(1, 131, 97 + size)])
    alone = F.conv2d(torch.zeros(1, 1, size, size), torch.zeros(1, 1, 1, 1), stride=stride)
    assert valid_sizes(downsample_mask(mask, stride))[0].tolist() == list(alone.shape[-2:])
