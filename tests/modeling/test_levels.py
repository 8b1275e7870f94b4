"""Geometry of a padded multi-level memory."""

from __future__ import annotations

import torch

from dn_detr.modeling.transformers import Levels
from dn_detr.structures import downsample_mask, pad_images


def _levels() -> Levels:
    _, mask = pad_images([torch.zeros(1, 8, 8), torch.zeros(1, 4, 6)])
    return Levels.from_masks([downsample_mask(mask, 1), downsample_mask(mask, 2)])


def test_levels_lie_one_after_the_other():
    levels = _levels()
    assert levels.spatial_shapes.tolist() == [[8, 8], [4, 4]]
    assert levels.level_start_index.tolist() == [0, 64]
    assert levels.padding_mask.shape == (2, 80)
    assert levels.padding_mask.sum(1).tolist() == [0, 80 - 24 - 6]


def test_valid_ratios_are_width_before_height():
    assert _levels().valid_ratios.tolist() == [
        [[1.0, 1.0], [1.0, 1.0]],
        [[6 / 8, 4 / 8], [3 / 4, 2 / 4]],
    ]


def test_cell_centres_span_the_image_and_leave_it_in_the_padding():
    levels = _levels()
    centres, padding = levels.cell_centres(), levels.padding_mask
    inside = ((centres > 0) & (centres < 1)).all(-1)
    assert torch.equal(inside, ~padding)
    torch.testing.assert_close(centres[1, 0], torch.tensor([0.5 / 6, 0.5 / 4]))


def test_references_relative_to_the_image_become_relative_to_each_padded_map():
    levels = _levels()
    padded = levels.to_padded(torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]).expand(2, -1, -1))
    torch.testing.assert_close(padded[0, 0, 1], torch.tensor([0.5, 0.5, 0.2, 0.4]))
    torch.testing.assert_close(padded[1, 0, 0], torch.tensor([0.375, 0.25, 0.15, 0.2]))


def test_all_cells_of_a_batch_without_padding_are_attended_to():
    levels = _levels()
    assert levels.attention_mask is levels.padding_mask
    _, mask = pad_images([torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)])
    assert Levels.from_masks([mask, downsample_mask(mask, 2)]).attention_mask is None
