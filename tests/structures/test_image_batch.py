"""Padding and its mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dn_detr.structures import downsample_mask, may_hold_padding, pad_images, valid_sizes


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


def test_padding_is_looked_for_where_that_is_free():
    _, padded = pad_images([torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)])
    _, full = pad_images([torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)])
    assert may_hold_padding(padded) and not may_hold_padding(full)
    assert may_hold_padding(full.to("meta"))  # stands for an accelerator, which would be waited for


def test_a_traced_graph_reckons_with_padding():
    _, full = pad_images([torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)])
    traced = torch.compile(lambda mask: mask.sum() + may_hold_padding(mask), backend="eager")
    assert traced(full) == 1
