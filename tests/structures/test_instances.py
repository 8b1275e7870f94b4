"""Instances and Boxes: the part of detectron2's protocol that others rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dn_detr.structures import Boxes, Instances


@pytest.fixture
def instances() -> Instances:
    boxes = Boxes([[0, 0, 10, 10], [5, 5, 8, 9], [1, 2, 3, 4]])
    return Instances((20, 30), gt_boxes=boxes, gt_classes=torch.tensor([3, 1, 2]))


def test_fields_are_attributes(instances):
    instances.scores = torch.tensor([0.1, 0.2, 0.3])
    assert instances.has("scores") and instances.get("scores")[2] == pytest.approx(0.3)
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "scores"}
    instances.remove("scores")
    assert not instances.has("scores")


def test_unknown_field_is_an_attribute_error_that_lists_the_others(instances):
    with pytest.raises(AttributeError, match="gt_classes"):
        _ = instances.scores


def test_fields_of_another_length_are_refused(instances):
    with pytest.raises(ValueError, match="length 2, not 3"):
        instances.scores = torch.zeros(2)


@pytest.mark.parametrize(
    ("item", "classes"),
    [
        (0, [3]),
        (-1, [2]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([2, 0]), [2, 3]),
        (torch.tensor([True, False, True]), [3, 2]),
    ],
)
def test_indexing_keeps_fields_in_step(instances, item, classes):
    chosen = instances[item]
    assert chosen.gt_classes.tolist() == classes
    assert len(chosen.gt_boxes) == len(classes) and chosen.image_size == (20, 30)


@pytest.mark.parametrize("is_chosen", [True, False])
def test_a_mask_of_one_object_chooses_from_an_array(is_chosen):
    one = Instances((4, 4), scores=torch.ones(1), class_names=np.array(["digit 3"]))
    assert list(one[torch.tensor([is_chosen])].class_names) == ["digit 3"] * is_chosen


def test_index_out_of_range_is_an_index_error(instances):
    with pytest.raises(IndexError):
        _ = instances[3]


def test_no_boxes_have_shape_0_4():
    assert Boxes([]).tensor.shape == (0, 4)
    assert Boxes(torch.zeros(0, 4)).area().shape == (0,)


def test_boxes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        Boxes(torch.zeros(2, 5))


def test_moving_keeps_everything(instances):
    moved = instances.to("cpu")
    assert torch.equal(moved.gt_boxes.tensor, instances.gt_boxes.tensor)
    assert len(moved) == 3
