"""Further fields of an annotation, added outside the package, on their way to the instances."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.tv_tensors import KeyPoints, Mask

from dn_detr.data import CocoDetection, train_transforms
from dn_detr.data.transforms import Sample, crop, horizontal_flip, move, resize


class WithMasks(CocoDetection):
    """What a project writes to train on masks, centres and an attribute of its own."""

    def ground_truth(self, index: int) -> dict[str, Any]:
        entries = self.annotations(index)
        size = self.image_sizes[index]
        masks = [self.coco.annToMask(entry) for entry in entries]
        centres = torch.tensor([entry["centre"] for entry in entries]).reshape(-1, 2)
        return super().ground_truth(index) | {
            "gt_masks": Mask(np.array(masks, np.uint8).reshape(-1, *size)),
            "gt_centres": KeyPoints(centres, canvas_size=size),
            "gt_colours": torch.tensor([entry["colour"] for entry in entries], dtype=torch.int64),
        }


@pytest.fixture
def open_masks(folder: Any) -> Callable[..., WithMasks]:
    """Three objects on the wide image (40 x 30): a triangle, a crowd, a rectangle; one is red."""
    polygons = [
        [5, 6, 15, 6, 10, 18],
        [0, 0, 40, 0, 40, 30, 0, 30],
        [30, 20, 38, 20, 38, 28, 30, 28],
    ]
    folder.content["annotations"] = []
    for id_, polygon in enumerate(polygons, start=1):
        xs, ys = polygon[::2], polygon[1::2]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        centre = [box[0] + box[2] / 2, box[1] + box[3] / 2]
        more = dict(segmentation=[polygon], centre=centre, colour=id_ % 2, iscrowd=int(id_ == 2))
        folder.annotate(id_, box, image_id=20, **more)

    def open_folder(transform: Callable[[Sample], Sample] | None = None) -> WithMasks:
        folder.open()  # writes the file
        return WithMasks(
            folder.images_dir,
            folder.annotation_file,
            None if transform is None else lambda sample, rng: transform(sample),
            train=True,
        )

    return open_folder


def drawn(polygon: list[float], height: int, width: int) -> np.ndarray:
    """The pixels that pycocotools fills."""
    return rle.decode(rle.merge(rle.frPyObjects([polygon], height, width)))


TRIANGLE, SQUARE = [5, 6, 15, 6, 10, 18], [30, 20, 38, 20, 38, 28, 30, 28]


def test_fields_of_a_subclass_reach_the_instances(open_masks: Callable[..., WithMasks]) -> None:
    instances = open_masks()[1]["instances"]
    masks = np.stack([drawn(TRIANGLE, 30, 40), drawn(SQUARE, 30, 40)])
    np.testing.assert_array_equal(instances.gt_masks.numpy(), masks)
    assert instances.gt_colours.tolist() == [1, 1]
    assert instances.gt_centres.tolist() == [[10, 12], [34, 24]]
    assert type(instances.gt_masks) is torch.Tensor


def test_an_image_without_objects_has_empty_fields(open_masks: Callable[..., WithMasks]) -> None:
    dataset = open_masks(lambda sample: resize(sample, (100, 40)))
    assert dataset[0]["instances"].gt_masks.shape == (0, 100, 40)


def test_a_flip_mirrors_masks_and_points(open_masks: Callable[..., WithMasks]) -> None:
    instances = open_masks(horizontal_flip)[1]["instances"]
    masks = np.stack([drawn(TRIANGLE, 30, 40), drawn(SQUARE, 30, 40)])[:, :, ::-1]
    np.testing.assert_array_equal(instances.gt_masks.numpy(), masks)
    assert instances.gt_centres[:, 1].tolist() == [12, 24]
    assert (instances.gt_centres[:, 0] - torch.tensor([30.0, 6.0])).abs().max() <= 1


def test_a_crop_cuts_masks_and_drops_what_it_removes(open_masks: Callable[..., WithMasks]) -> None:
    instances = open_masks(lambda sample: crop(sample, 8, 3, 15, 20))[1]["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[2, 0, 12, 10]]
    np.testing.assert_array_equal(
        instances.gt_masks.numpy(), drawn(TRIANGLE, 30, 40)[None, 8:23, 3:23]
    )
    assert instances.gt_colours.tolist() == [1] and instances.gt_centres.tolist() == [[7, 4]]
    assert instances.gt_ids.tolist() == [0]


def test_a_resize_scales_masks(open_masks: Callable[..., WithMasks]) -> None:
    instances = open_masks(lambda sample: resize(sample, (60, 120)))[1]["instances"]
    scaled = [[2, 3][i % 2 == 0] * value for i, value in enumerate(SQUARE)]
    np.testing.assert_array_equal(instances.gt_masks[1].numpy(), drawn(scaled, 60, 120))
    enlarged = drawn(TRIANGLE, 30, 40).repeat(2, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(instances.gt_masks[0].numpy(), enlarged)


def test_masks_stay_under_their_boxes_in_the_recipe(open_masks: Callable[..., WithMasks]) -> None:
    dataset = open_masks()
    dataset.transforms = train_transforms(0.2)
    for epoch in range(20):
        instances = dataset[epoch, 1]["instances"]
        assert instances.gt_masks.shape == (len(instances), *instances.image_size)
        for box, mask in zip(instances.gt_boxes.tensor, instances.gt_masks, strict=True):
            rows, columns = np.nonzero(mask.numpy())
            if len(rows):  # a crop may leave a corner of the box without any of the object
                x1, y1, x2, y2 = box.tolist()
                assert x1 - 3 <= columns.min() and columns.max() + 1 <= x2 + 3
                assert y1 - 3 <= rows.min() and rows.max() + 1 <= y2 + 3


def test_a_map_of_the_whole_image_moves_too() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    sample = {"image": Image.fromarray(pixels.numpy()).convert("RGB"), "depth": Mask(pixels)}
    moved = train_transforms(short_sides=[3], flip_probability=1.0, crop_probability=0.0)(
        sample, random.Random(0)
    )
    assert moved["depth"].tolist() == pixels.flip(1).tolist()
    assert sample["depth"].tolist() == pixels.tolist()


def test_samples_without_masks_draw_and_move_none(
    open_masks: Callable[..., WithMasks], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_masks, moved = [], Counter[str]()

    def counted(sample: Sample, function: Callable[[Any], Any]) -> Sample:
        def of_one(value: Any) -> Any:
            moved[type(value).__name__] += 1
            return function(value)

        return move(sample, of_one)

    monkeypatch.setattr(COCO, "annToMask", lambda *_: drawn_masks.append(1))
    monkeypatch.setattr("dn_detr.data.transforms.move", counted)
    with_masks = open_masks(horizontal_flip)
    plain = CocoDetection(
        with_masks.image_dir, with_masks.annotation_file, with_masks.transforms, train=True
    )
    sample = plain[1]
    assert set(sample["instances"].get_fields()) == {"gt_boxes", "gt_classes", "gt_ids"}
    assert not drawn_masks and moved == {"Image": 1, "BoundingBoxes": 1}
