"""Box arithmetic against torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.ops as reference

from dn_detr.structures import (
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    inverse_sigmoid,
    pairwise_generalized_box_iou,
)


def _boxes_xyxy(count: int, seed: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    return torch.cat([corners.amin(1), corners.amax(1)], dim=-1)


def test_conversions_are_torchvisions():
    boxes = _boxes_xyxy(20, 0)
    expected = reference.box_convert(boxes, "xyxy", "cxcywh")
    torch.testing.assert_close(box_xyxy_to_cxcywh(boxes), expected)
    torch.testing.assert_close(box_cxcywh_to_xyxy(expected), boxes)


def test_pairwise_giou_is_torchvisions_up_to_the_published_epsilon():
    a, b = _boxes_xyxy(20, 0) * 100, _boxes_xyxy(30, 1) * 100  # large: 1e-6 does not matter
    expected = reference.generalized_box_iou(a, b)
    torch.testing.assert_close(pairwise_generalized_box_iou(a, b), expected, rtol=0, atol=1e-5)


def test_elementwise_giou_is_the_diagonal():
    a, b = _boxes_xyxy(10, 0), _boxes_xyxy(10, 1)
    diagonal = pairwise_generalized_box_iou(a, b).diagonal()
    torch.testing.assert_close(generalized_box_iou(a, b), diagonal)


def test_giou_of_two_empty_boxes_is_finite():
    empty = torch.zeros(1, 4)
    assert generalized_box_iou(empty, empty).isfinite().all()


def test_inverse_sigmoid_inverts_inside_and_saturates_outside():
    x = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    limit = math.log(1000)
    assert ends.tolist() == pytest.approx([-limit, -limit, limit, limit], rel=1e-6)
