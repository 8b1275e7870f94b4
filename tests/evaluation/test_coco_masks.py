"""The metrics of masks against plain pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr.data import CocoDetection
from dn_detr.errors import UserError
from dn_detr.evaluation import CocoEvaluator
from dn_detr.evaluation.coco import METRIC_NAMES
from dn_detr.structures import Boxes, Instances

HEIGHT, WIDTH = 60, 80
IMAGE_IDS, CATEGORY_IDS = [4, 9], [3, 8]


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


# image id, category id, mask
TRUTH = [
    (4, 3, disc(20, 20, 12)),
    (4, 8, disc(50, 30, 18)),
    (9, 3, disc(30, 30, 6)),
    (9, 3, disc(60, 20, 9)),
]
# and score; the third has the box of its object but little of its mask
FOUND = [
    (4, 3, disc(21, 20, 12), 0.75),
    (4, 8, disc(50, 30, 15), 0.5),
    (4, 8, disc(50, 30, 18) ^ disc(50, 30, 17), 0.875),
    (9, 3, disc(30, 31, 6), 0.625),
    (9, 8, disc(60, 20, 9), 0.25),
]


def bounding_box(mask: np.ndarray) -> list[float]:
    return rle.toBbox(rle.encode(np.asfortranarray(mask, np.uint8))).tolist()


def write_data(root: Path, **spoiled: Any) -> CocoDetection:
    """Discs in two images whose files are never opened; one is a polygon, the others encoded."""
    for id_ in IMAGE_IDS:
        (root / f"{id_}.jpg").touch()
    annotations = []
    for id_, (image_id, category_id, mask) in enumerate(TRUTH, start=1):
        encoding = rle.encode(np.asfortranarray(mask, np.uint8))
        encoding["counts"] = encoding["counts"].decode()
        annotations.append(
            {
                "id": id_, "image_id": image_id, "category_id": category_id, "iscrowd": 0,
                "bbox": bounding_box(mask), "area": int(mask.sum()), "segmentation": encoding,
            }
        )  # fmt: skip
    annotations[2]["segmentation"] = [[24, 24, 36, 24, 36, 36, 24, 36]]
    annotations[0].update(spoiled)
    content = {
        "images": [
            {"id": id_, "file_name": f"{id_}.jpg", "width": WIDTH, "height": HEIGHT}
            for id_ in IMAGE_IDS
        ],
        "annotations": annotations,
        "categories": [{"id": id_, "name": f"class {id_}"} for id_ in CATEGORY_IDS],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return CocoDetection(root, root / "instances.json", train=False)


def instances_of(image_id: int) -> Instances:
    found = [entry for entry in FOUND if entry[0] == image_id]
    boxes = torch.tensor([bounding_box(mask) for _, _, mask, _ in found])
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([score for *_, score in found]),
        pred_classes=torch.tensor([CATEGORY_IDS.index(id_) for _, id_, *_ in found]),
        pred_masks=torch.tensor(np.stack([mask for _, _, mask, _ in found])),
    )


def evaluate(dataset: CocoDetection, evaluator: CocoEvaluator) -> dict[str, Any]:
    evaluator.reset(dataset)
    for image_id in IMAGE_IDS:
        evaluator.process([{"image_id": image_id}], [{"instances": instances_of(image_id)}])
    metrics = evaluator.evaluate()
    assert metrics is not None
    return metrics


def reference(file: Path, iou_type: str) -> list[float]:
    """The 12 numbers of plain pycocotools."""
    results = []
    for image_id, category_id, mask, score in FOUND:
        result: dict[str, Any] = {"image_id": image_id, "category_id": category_id, "score": score}
        if iou_type == "segm":
            result["segmentation"] = rle.encode(np.asfortranarray(mask, np.uint8))
        else:
            result["bbox"] = bounding_box(mask)
        results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_masks_and_boxes_have_the_numbers_of_pycocotools(tmp_path: Path) -> None:
    dataset = write_data(tmp_path)
    metrics = evaluate(dataset, CocoEvaluator(iou_types=["bbox", "segm"]))
    boxes, masks = (reference(dataset.annotation_file, kind) for kind in ("bbox", "segm"))
    assert [metrics[name] for name in METRIC_NAMES] == boxes
    assert [metrics["segm"][name] for name in METRIC_NAMES] == masks
    assert boxes[0] != masks[0] > 0


def test_masks_alone_have_no_results_of_boxes(tmp_path: Path) -> None:
    dataset = write_data(tmp_path)
    metrics = evaluate(dataset, CocoEvaluator(iou_types=["segm"]))
    assert list(metrics) == ["segm"]
    assert metrics["segm"]["AP"] == reference(dataset.annotation_file, "segm")[0]
    assert list(metrics["segm"]["per_class"]) == ["class 3", "class 8"]


def test_names_of_results_are_those_that_an_evaluation_returns(tmp_path: Path) -> None:
    evaluator = CocoEvaluator(iou_types=["bbox", "segm"])
    metrics = evaluate(write_data(tmp_path), evaluator)
    assert isinstance(metrics["segm"]["AP50"], float)
    names = evaluator.result_names(["class 3"])
    assert {"AP", "per_class/class 3", "segm/AP50", "segm/per_class/class 3"} <= set(names)
    assert not any(name.startswith("segm") for name in CocoEvaluator().result_names([]))


def test_written_results_hold_masks_that_pycocotools_reads(tmp_path: Path) -> None:
    dataset = write_data(tmp_path)
    evaluate(dataset, CocoEvaluator(tmp_path / "eval", iou_types=["segm"]))
    results = json.loads((tmp_path / "eval/predictions.json").read_text())
    assert [result["score"] for result in results] == [score for *_, score in FOUND]
    for result, (_, _, mask, _) in zip(results, FOUND, strict=True):
        np.testing.assert_array_equal(rle.decode(result["segmentation"]), mask)


def test_without_masks_their_evaluation_is_refused(tmp_path: Path) -> None:
    evaluator = CocoEvaluator(iou_types=["segm"])
    evaluator.reset(write_data(tmp_path))
    instances = instances_of(4)
    instances.remove("pred_masks")
    with pytest.raises(UserError, match="no pred_masks"):
        evaluator.process([{"image_id": 4}], [{"instances": instances}])


def test_masks_of_another_size_than_the_image_are_refused(tmp_path: Path) -> None:
    evaluator = CocoEvaluator(iou_types=["segm"])
    evaluator.reset(write_data(tmp_path))
    instances = instances_of(4)
    instances.pred_masks = instances.pred_masks[:, ::2]
    with pytest.raises(UserError, match=r"image id 4: .*\(3, 30, 80\), expected \(3, 60, 80\)"):
        evaluator.process([{"image_id": 4}], [{"instances": instances}])


def test_ground_truth_without_masks_is_refused(tmp_path: Path) -> None:
    dataset = write_data(tmp_path, segmentation=[])
    with pytest.raises(UserError, match=r"1 annotations have no 'segmentation' \(ids 1\)"):
        CocoEvaluator(iou_types=["segm"]).reset(dataset)


@pytest.mark.parametrize(
    "wrong",
    [
        "x",
        True,
        [1, 2, 3, 4, 5, 6],
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6], []],
        [[1, 2, 3, 4, 5, 6, 7]],
        [["a"] * 6],
        [[None] * 6],
        [[float("nan")] * 6],
        [[0, 0, 1e9, 0, 1e9, 1e9]],  # pycocotools would crash
        [[0, 0, 9e5, 9e5] * 20],
        {"counts": [HEIGHT * WIDTH]},
        {"counts": [HEIGHT * WIDTH], "size": [WIDTH, HEIGHT]},
        {"counts": [5], "size": [HEIGHT, WIDTH]},
        {"counts": [-1, HEIGHT * WIDTH + 1], "size": [HEIGHT, WIDTH]},
        {"counts": "oooo", "size": [HEIGHT, WIDTH]},  # pycocotools would read on
        {"counts": "", "size": [HEIGHT, WIDTH]},
    ],
)
def test_a_mask_that_is_none_of_its_image_is_refused_with_its_id(
    tmp_path: Path, wrong: Any
) -> None:
    dataset = write_data(tmp_path, segmentation=wrong)
    with pytest.raises(UserError, match=r"of 1 annotations \(ids 1\) is no mask of their image"):
        CocoEvaluator(iou_types=["segm"]).reset(dataset)


def test_run_lengths_that_are_not_compressed_are_masks(tmp_path: Path) -> None:
    counts = {"counts": [100, 50, HEIGHT * WIDTH - 150], "size": [HEIGHT, WIDTH]}
    CocoEvaluator(iou_types=["segm"]).reset(write_data(tmp_path, segmentation=counts))


@pytest.mark.parametrize("iou_types", [[], ["boxes"], ["bbox", "keypoints"]])
def test_other_kinds_of_overlap_are_refused(iou_types: list[str]) -> None:
    with pytest.raises(UserError, match="give one or more of"):
        CocoEvaluator(iou_types=iou_types)
