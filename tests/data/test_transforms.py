from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dn_detr.data import test_transforms as build_test_transforms
from dn_detr.data import train_transforms
from dn_detr.data.transforms import crop, horizontal_flip, resize, resized_size, to_uint8_tensor

# The image and boxes that the reference pipeline was run on; see official_transforms.npz.
SMALL_BOXES = [[10, 20, 110, 140], [150, 5, 199, 60], [0, 0, 30, 30], [90, 70, 95, 149]]
LARGE_BOXES = [[10, 20, 310, 240], [450, 105, 639, 360], [0, 0, 30, 30], [290, 170, 395, 426]]
LARGE_LABELS = [1, 2, 3, 90]


def reference_image(seed: int, height: int, width: int) -> Image.Image:
    state = np.random.RandomState(seed)
    return Image.fromarray(state.randint(0, 256, (height, width, 3)).astype(np.uint8))


def reference_boxes(boxes: list[list[int]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32)


@pytest.fixture
def golden(shared: Path) -> Any:
    return np.load(shared / "golden/official/official_transforms.npz")


@pytest.fixture
def meta(golden: Any) -> dict[str, Any]:
    return json.loads(str(golden["meta"]))


def assert_matches(result: tuple[Image.Image, Tensor], golden: Any, name: str) -> None:
    image, boxes = result
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    np.testing.assert_array_equal(np.asarray(image), golden[f"{name}_image"])
    np.testing.assert_allclose(boxes[kept].numpy(), golden[f"{name}_boxes"], rtol=1e-6)


def assert_reproduces_run(result: tuple[Image.Image, Tensor], run: dict[str, Any]) -> None:
    image, boxes = result
    pixels = to_uint8_tensor(image).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normalised = (pixels - mean) / std
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    x1, y1, x2, y2 = boxes[kept].unbind(1)
    centres = torch.stack([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)], 1) / 2
    size = torch.tensor([image.width, image.height, image.width, image.height])
    assert list(pixels.shape) == run["shape"]
    assert normalised.mean().item() == pytest.approx(run["mean"], abs=1e-5)
    assert normalised.std().item() == pytest.approx(run["std"], abs=1e-5)
    np.testing.assert_allclose((centres / size).numpy(), run["boxes"], atol=1e-6)


class ReferenceDraws(random.Random):
    """Draws as the reference does: the corner of a crop comes from torch's global generator."""

    def randint(self, a: int, b: int) -> int:
        if a > 0:
            return super().randint(a, b)
        return int(torch.randint(0, b + 1, size=(1,)).item())


def test_resized_sizes_equal_the_reference(meta: dict[str, Any]) -> None:
    for case in meta["resize"]:
        width, height = case["wh"]
        assert list(resized_size(height, width, case["short"], case["max"])) == case["hw"]


def test_flip_equals_the_reference(golden: Any) -> None:
    image, boxes = reference_image(7, 150, 200), reference_boxes(SMALL_BOXES)
    assert_matches(horizontal_flip(image, boxes), golden, "hflip")


@pytest.mark.parametrize(("name", "size"), [("resize", (98, 130)), ("resize_up", (180, 240))])
def test_resize_equals_the_reference(golden: Any, name: str, size: tuple[int, int]) -> None:
    image, boxes = reference_image(7, 150, 200), reference_boxes(SMALL_BOXES)
    assert_matches(resize(image, boxes, size), golden, name)


def test_crop_equals_the_reference(golden: Any) -> None:
    image, boxes = reference_image(7, 150, 200), reference_boxes(SMALL_BOXES)
    assert_matches(crop(image, boxes, 15, 40, 90, 100), golden, "crop")


@pytest.mark.parametrize("seed", range(12))
def test_training_pipeline_equals_the_reference(meta: dict[str, Any], seed: int) -> None:
    run = next(run for run in meta["train_runs"] if run["seed"] == seed)
    image, boxes = reference_image(8, 427, 640), reference_boxes(LARGE_BOXES)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        result = train_transforms()(image, boxes, ReferenceDraws(seed))
    assert_reproduces_run(result, run)
    kept = (result[1][:, 2:] > result[1][:, :2]).all(dim=1)
    assert torch.tensor(LARGE_LABELS)[kept].tolist() == run["labels"]


def test_validation_pipeline_equals_the_reference(meta: dict[str, Any]) -> None:
    image, boxes = reference_image(8, 427, 640), reference_boxes(LARGE_BOXES)
    assert_reproduces_run(build_test_transforms()(image, boxes, random.Random(0)), meta["val"])


def test_scale_multiplies_every_size() -> None:
    image = Image.new("RGB", (640, 480))
    resized, _ = build_test_transforms(0.4)(image, torch.zeros(0, 4), random.Random(0))
    assert (resized.height, resized.width) == (320, 426)
    shorts = {round(0.4 * size) for size in range(480, 801, 32)}
    for seed in range(40):
        augmented, _ = train_transforms(0.4)(image, torch.zeros(0, 4), random.Random(seed))
        sides = sorted(augmented.size)
        assert sides[0] in shorts or sides[1] in (533, 532)
        assert sides[1] <= round(0.4 * 1333)


def test_other_recipes_are_a_matter_of_parameters() -> None:
    recipe = train_transforms(short_sides=[96, 128], flip_probability=0.0, crop_probability=0.0)
    image = reference_image(0, 50, 70)
    box = torch.tensor([[0.0, 0.0, 35.0, 50.0]])
    for seed in range(10):
        augmented, boxes = recipe(image, box, random.Random(seed))
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
    image, moved = recipe(Image.new("RGB", (width, height)), boxes, random.Random(seed))
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
        image, boxes = recipe(Image.fromarray(pixels), box, random.Random(seed))
        rows, columns = np.nonzero(np.asarray(image)[:, :, 0] > 127)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(boxes[0].numpy(), found, atol=1.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0},
        {"scale": float("nan")},
        {"short_sides": []},
        {"short_sides": [0]},
        {"flip_probability": 1.5},
        {"crop_range": (600, 384)},
    ],
)
def test_meaningless_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        train_transforms(**wrong)
