"""The data pipeline against what the official code printed (golden file official_transforms.npz).

Compared: output sizes, pixels and boxes of every transform, the training and validation pipelines
up to the tensors that the model sees, and the reading of annotations. Left out: `area`,
`iscrowd`, `size` and `orig_size` of the official targets, which no part of this library
needs in training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.tv_tensors import BoundingBoxes

from dn_detr.config import get_config
from dn_detr.data import CocoDetection, train_transforms
from dn_detr.data import test_transforms as build_test_transforms
from dn_detr.data.transforms import crop, horizontal_flip, resize, resized_size
from dn_detr.modeling import (
    AnchorQueries,
    DetectionCriterion,
    DetectionHeads,
    Detector,
    PostProcess,
)
from dn_detr.structures import Boxes, Instances

# What the golden file's pictures show; its README gives the pixels.
SMALL_BOXES = [[10, 20, 110, 140], [150, 5, 199, 60], [0, 0, 30, 30], [90, 70, 95, 149]]
LARGE_BOXES = [[10, 20, 310, 240], [450, 105, 639, 360], [0, 0, 30, 30], [290, 170, 395, 426]]
LABELS = [1, 2, 3, 90]


class OfficialDraws(random.Random):
    """Draws as the official code does: the corner of a crop comes from torch's generator.

    Corners are the only draws whose lower bound is 0.
    """

    def randint(self, a: int, b: int) -> int:
        if a > 0:
            return super().randint(a, b)
        return int(torch.randint(0, b + 1, size=(1,)).item())


def _image(seed: int, height: int, width: int) -> Image.Image:
    state = np.random.RandomState(seed)
    return Image.fromarray(state.randint(0, 256, (height, width, 3)).astype(np.uint8))


def _sample(seed: int, height: int, width: int, boxes_xyxy: list[list[int]]) -> dict[str, Any]:
    """What the data set hands to a transform."""
    size = (height, width)
    boxes = BoundingBoxes(
        torch.tensor(boxes_xyxy, dtype=torch.float32), format="XYXY", canvas_size=size
    )
    instances = Instances(size, gt_boxes=boxes, gt_classes=torch.tensor(LABELS))
    return {"image": _image(seed, height, width), "instances": instances}


def _small() -> dict[str, Any]:
    return _sample(7, 150, 200, SMALL_BOXES)


def _large() -> dict[str, Any]:
    return _sample(8, 427, 640, LARGE_BOXES)


@pytest.fixture
def golden(shared: Path) -> dict[str, Any]:
    with np.load(shared / "golden/official/official_transforms.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def meta(golden: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(str(golden["meta"]))
    return content


@pytest.fixture
def detector() -> Detector:
    """The input side of the zoo's models; what comes after it is empty."""
    published = get_config("models/dn_deformable_detr_r50.py").model
    return Detector(
        *[nn.Identity() for _ in range(3)],
        AnchorQueries(1, 8),
        nn.Identity(),
        DetectionHeads(91, 8, 1),
        DetectionCriterion(),
        PostProcess(),
        num_classes=91,
        num_queries=1,
        pixel_mean=published.pixel_mean,
        pixel_std=published.pixel_std,
    )


def _kept(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)


def _finished(sample: dict[str, Any]) -> dict[str, Any]:
    """What the data set makes of a transformed sample."""
    instances = sample["instances"]
    instances = instances[_kept(instances.gt_boxes)]
    instances.gt_boxes = Boxes(instances.gt_boxes)
    return {"image": pil_to_tensor(sample["image"]), "instances": instances}


def _assert_equals(sample: dict[str, Any], golden: dict[str, Any], name: str) -> None:
    np.testing.assert_array_equal(np.asarray(sample["image"]), golden[f"{name}_image"])
    instances = _finished(sample)["instances"]
    boxes = instances.gt_boxes.tensor.numpy()
    np.testing.assert_allclose(boxes, golden[f"{name}_boxes"], rtol=1e-6)
    np.testing.assert_array_equal(instances.gt_classes.numpy(), golden[f"{name}_labels"])


def _assert_reproduces_run(detector: Detector, sample: dict[str, Any], run: dict[str, Any]) -> None:
    sample = _finished(sample)
    pixels, mask = detector.preprocess([sample])
    (target,) = detector.prepare_targets([sample])
    assert list(pixels[0].shape) == run["shape"]
    assert not mask.any()
    assert pixels.mean().item() == pytest.approx(run["mean"], abs=1e-5)
    assert pixels.std().item() == pytest.approx(run["std"], abs=1e-5)
    np.testing.assert_allclose(target["boxes"].numpy(), run["boxes"], atol=1e-6)


def test_resized_sizes_are_the_official_ones(meta):
    for case in meta["resize"]:
        width, height = case["wh"]
        assert list(resized_size(height, width, case["short"], case["max"])) == case["hw"]


def test_flip_is_the_official_one(golden):
    _assert_equals(horizontal_flip(_small()), golden, "hflip")


@pytest.mark.parametrize(("name", "size"), [("resize", (98, 130)), ("resize_up", (180, 240))])
def test_resize_is_the_official_one(golden, name, size):
    _assert_equals(resize(_small(), size), golden, name)


def test_crop_is_the_official_one(golden):
    _assert_equals(crop(_small(), 15, 40, 90, 100), golden, "crop")


def test_normalised_image_and_boxes_are_the_official_ones(golden, detector):
    sample = _finished(crop(_small(), 15, 40, 90, 100))
    pixels, _ = detector.preprocess([sample])
    (target,) = detector.prepare_targets([sample])
    # The model divides by 255 * std at once, the official code by 255 and then by std.
    np.testing.assert_allclose(pixels[0].numpy(), golden["normalize_image"], atol=1e-6)
    np.testing.assert_allclose(target["boxes"].numpy(), golden["normalize_boxes"], atol=1e-7)
    np.testing.assert_array_equal(target["labels"].numpy(), golden["normalize_labels"])


@pytest.mark.parametrize("seed", range(12))
def test_training_pipeline_reproduces_the_official_run(meta, detector, seed):
    run = meta["train_runs"][seed]
    with torch.random.fork_rng():
        torch.manual_seed(run["seed"])
        sample = train_transforms()(_large(), OfficialDraws(run["seed"]))
    _assert_reproduces_run(detector, sample, run)
    assert _finished(sample)["instances"].gt_classes.tolist() == run["labels"]


def test_every_official_run_is_compared(meta):
    assert [run["seed"] for run in meta["train_runs"]] == list(range(12))


def test_validation_pipeline_reproduces_the_official_run(meta, detector):
    sample = build_test_transforms()(_large(), random.Random(0))
    _assert_reproduces_run(detector, sample, meta["val"])


def _read_annotations(
    folder: Path, annotations: list[dict[str, Any]], image_wh: list[int]
) -> tuple[CocoDetection, dict[str, Any]]:
    """The data set and sample of one image with these annotations.

    A second image with one box makes it a data set that can be trained on.
    """
    width, height = image_wh
    for name in ("first.png", "second.png"):
        _image(0, height, width).save(folder / name)
    size = {"width": width, "height": height}
    own = [{"image_id": 42, **annotation} for annotation in annotations]
    other = {"image_id": 43, "bbox": [0, 0, 9, 9], "category_id": 1, "area": 81.0, "iscrowd": 0}
    content = {
        "images": [
            {"id": 42, "file_name": "first.png", **size},
            {"id": 43, "file_name": "second.png", **size},
        ],
        "annotations": [{"id": i + 1, **entry} for i, entry in enumerate([*own, other])],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 7)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    dataset = CocoDetection(folder, folder / "annotations.json", train=True)
    return dataset, dataset[0]


def test_annotations_are_read_as_by_the_official_code(meta, tmp_path):
    official = meta["convert"]
    dataset, sample = _read_annotations(tmp_path, official["annotations"], official["image_wh"])
    instances = sample["instances"]
    assert instances.gt_boxes.tensor.tolist() == official["result"]["boxes"]
    categories = [dataset.category_ids[index] for index in instances.gt_classes.tolist()]
    assert categories == official["result"]["labels"]
    assert [sample["height"], sample["width"]] == official["result"]["orig_size"]


def test_image_without_annotations_has_the_official_shapes(meta, tmp_path):
    _, sample = _read_annotations(tmp_path, [], [200, 150])
    instances = sample["instances"]
    for tensor, name in ((instances.gt_boxes.tensor, "boxes"), (instances.gt_classes, "labels")):
        assert [list(tensor.shape), str(tensor.dtype)] == meta["convert_empty"][name]
