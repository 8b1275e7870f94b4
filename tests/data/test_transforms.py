"""The augmentation for any image and parameters; test_official_transforms.py has the reference."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes

from dn_detr.data import test_transforms as build_test_transforms
from dn_detr.data import train_transforms
from dn_detr.data.transforms import Transform, resized_size
from dn_detr.structures import Instances


def noise_image(seed: int, height: int, width: int) -> Image.Image:
    state = np.random.RandomState(seed)
    return Image.fromarray(state.randint(0, 256, (height, width, 3)).astype(np.uint8))


def apply(
    transform: Transform, image: Image.Image, boxes_xyxy: Tensor, seed: int
) -> tuple[Image.Image, Tensor]:
    """The image and the boxes of a sample after a transform."""
    size = (image.height, image.width)
    boxes = BoundingBoxes(boxes_xyxy, format="XYXY", canvas_size=size)
    sample = {"image": image, "instances": Instances(size, gt_boxes=boxes)}
    moved = transform(sample, random.Random(seed))
    instances = moved["instances"]
    assert instances.image_size == (moved["image"].height, moved["image"].width)
    return moved["image"], instances.gt_boxes


def test_scale_multiplies_every_size() -> None:
    image = Image.new("RGB", (640, 480))
    resized, _ = apply(build_test_transforms(0.4), image, torch.zeros(0, 4), 0)
    assert (resized.height, resized.width) == (320, 426)
    shorts = {round(0.4 * size) for size in range(480, 801, 32)}
    for seed in range(40):
        augmented, _ = apply(train_transforms(0.4), image, torch.zeros(0, 4), seed)
        sides = sorted(augmented.size)
        assert sides[0] in shorts or sides[1] in (533, 532)
        assert sides[1] <= round(0.4 * 1333)


def test_other_recipes_are_a_matter_of_parameters() -> None:
    recipe = train_transforms(short_sides=[96, 128], flip_probability=0.0, crop_probability=0.0)
    image = noise_image(0, 50, 70)
    box = torch.tensor([[0.0, 0.0, 35.0, 50.0]])
    for seed in range(10):
        augmented, boxes = apply(recipe, image, box, seed)
        assert augmented.height in (96, 128)
        torch.testing.assert_close(boxes[0, 0], torch.tensor(0.0))


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    seed=st.integers(0, 2**32),
    corners=st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 4), max_size=4),
)
def test_boxes_stay_inside_and_in_step_for_any_image(
    height: int, width: int, seed: int, corners: list[tuple[float, ...]]
) -> None:
    low_high = torch.tensor(corners).reshape(-1, 2, 2).sort(dim=1).values
    boxes = (low_high * torch.tensor([width, height])).reshape(-1, 4)
    recipe = train_transforms(0.1)
    image, moved = apply(recipe, Image.new("RGB", (width, height)), boxes, seed)
    assert moved.shape == boxes.shape and moved.dtype == torch.float32
    assert (moved[:, 2:] >= moved[:, :2]).all() and (moved >= 0).all()
    limit = torch.tensor([image.width, image.height, image.width, image.height])
    assert (moved <= limit * (1 + 1e-6)).all()


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    short=st.integers(1, 1000),
    limit=st.integers(1, 1500),
)
@settings(deadline=None)
def test_resized_size_is_never_empty(height: int, width: int, short: int, limit: int) -> None:
    new_height, new_width = resized_size(height, width, short, limit)
    assert min(new_height, new_width) >= 1
    assert (new_height <= new_width) == (height <= width) or new_height == new_width


def test_coloured_rectangle_stays_under_its_box() -> None:
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[100:200, 120:280] = 255
    box = torch.tensor([[120.0, 100.0, 280.0, 200.0]])
    recipe = train_transforms(short_sides=[200], crop_short_sides=[300], crop_range=(150, 250))
    for seed in range(20):
        image, boxes = apply(recipe, Image.fromarray(pixels), box, seed)
        rows, columns = np.nonzero(np.asarray(image)[:, :, 0] > 127)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(boxes[0].numpy(), found, atol=1.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0},
        {"scale": float("nan")},
        {"scale": 1e9},
        {"scale": float("inf")},
        {"short_sides": []},
        {"short_sides": [0]},
        {"flip_probability": 1.5},
        {"crop_range": (600, 384)},
    ],
)
def test_meaningless_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        train_transforms(**wrong)
