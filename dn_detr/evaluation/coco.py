"""COCO's 12 numbers and the average precision of every class, through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from dn_detr.distributed import gather_to_main
from dn_detr.errors import UserError, first_names

if TYPE_CHECKING:
    from dn_detr.data import CocoDetection

logger = logging.getLogger(__name__)

# In the order of COCOeval.stats.
METRIC_NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
IOU_TYPES = ("bbox", "segm")
_FARTHEST = 1e6  # pixels from the origin; pycocotools walks along the sides of a polygon


@dataclass(frozen=True)
class _Detections:
    """The detections in one image, as arrays: a data set has millions of them."""

    boxes_xywh: NDArray[np.float64]  # (n, 4) pixels
    scores: NDArray[np.float64]  # (n,)
    classes: NDArray[np.int64]  # (n,)
    masks: list[Any] | None  # n run-length encodings of COCO


class CocoEvaluator:
    """Collects detections, merges them over all ranks and computes COCO's metrics.

    What pycocotools does silently or not at all is defined here:

    * no detections: 0 where there is ground truth, -1 where there is none;
    * a box or score that is not finite, a negative class and an unknown image id are errors;
    * a class that the data does not have (of a model with more classes) is dropped, counted and
      warned about;
    * an image that arrives twice, also from two ranks, counts once (the first), and images
      that never arrived count as images without detections; both are warned about.

    The ground truth is that of the images in the data set given to `reset`, so a subset is
    evaluated as if the annotation file had no other images.

    Args:
        output_dir: folder for predictions.json (COCO's result format, original category ids) and
            metrics.json; None = write nothing.
        iou_types: what the detections are compared by, of "bbox" and "segm" (masks).

    Attributes:
        unwritten: files of this evaluation that could not be written, which the log has told.

    Raises:
        UserError: `iou_types` is empty or has another name.
    """

    def __init__(
        self, output_dir: str | Path | None = None, iou_types: Sequence[str] = ("bbox",)
    ) -> None:
        if not iou_types or not set(iou_types) <= set(IOU_TYPES):
            raise UserError(f"iou_types={list(iou_types)}: give one or more of {list(IOU_TYPES)}")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.iou_types = tuple(iou_types)
        self.unwritten: list[Path] = []
        self._dataset: CocoDetection | None = None

    def result_names(self, class_names: Sequence[str]) -> list[str]:
        """Names of the results of an evaluation: "AP", "per_class/cat", "segm/AP" and so on."""
        names = [*METRIC_NAMES, *(f"per_class/{name}" for name in class_names)]
        return [
            name if iou_type == "bbox" else f"{iou_type}/{name}"
            for iou_type in self.iou_types
            for name in names
        ]

    def reset(self, dataset: CocoDetection) -> None:
        """Forget everything and evaluate on `dataset` from now on.

        Raises:
            UserError: masks are to be evaluated, and the annotation file lacks some or has some
                that are none of their image.
        """
        if "segm" in self.iou_types:
            annotations = dataset.coco.dataset["annotations"]
            maskless = [a["id"] for a in annotations if not a.get("segmentation")]
            if maskless:
                raise UserError(
                    f"{dataset.annotation_file}: {len(maskless)} annotations have no"
                    f" 'segmentation' (ids {first_names(maskless)}), so iou_types cannot have segm"
                )
            # pycocotools would crash, or count the object as missed.
            wrong = [a["id"] for a in annotations if not _is_mask(a, dataset.coco.imgs)]
            if wrong:
                raise UserError(
                    f"{dataset.annotation_file}: the 'segmentation' of {len(wrong)} annotations"
                    f" (ids {first_names(wrong)}) is no mask of their image: give polygons of at"
                    " least three points, or run lengths of the image's size"
                )
        self._dataset = dataset
        self._known_images = set(dataset.image_ids)
        self._detections: dict[int, _Detections] = {}
        self._repeated: set[int] = set()
        self._dropped = 0
        self.unwritten = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take the detections of a batch.

        Args:
            inputs: samples; only `image_id` is read.
            outputs: one dict per sample with `instances`: `pred_boxes` (XYXY, pixels of the
                original image), `scores` (n,), `pred_classes` (n,) int, and for "segm"
                `pred_masks` (n, height, width) bool, pixels of the original image.

        Raises:
            UserError: `reset` was not called, the numbers of inputs and outputs differ, the image
                is not in the data set, a box or score is not finite, a class is negative, or
                masks are missing or of another size than the image.
        """
        if len(inputs) != len(outputs):
            raise UserError(f"{len(inputs)} images but {len(outputs)} outputs of the model")
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = int(sample["image_id"])
            detections = self._checked(image_id, output["instances"])
            if image_id in self._detections:
                self._repeated.add(image_id)
            else:
                self._detections[image_id] = detections

    def evaluate(self) -> dict[str, Any] | None:
        """Merge the detections of all ranks and compute the metrics on the main process.

        Returns:
            On the main process: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl of
            the boxes as pycocotools has them (0 to 1, -1 = no ground truth) and `per_class`:
            {name: AP}; the same of the masks in a dict under `segm`. None on the other ranks.

        Raises:
            UserError: `reset` was not called.
        """
        dataset = self._require_dataset()
        gathered = gather_to_main((self._detections, self._repeated, self._dropped))
        if gathered is None:
            return None
        merged: dict[int, _Detections] = {}
        repeated: set[int] = set()
        for detections, seen_twice, _ in gathered:
            repeated |= seen_twice | (merged.keys() & detections.keys())
            merged = detections | merged
        self._warn(merged, repeated, sum(dropped for _, _, dropped in gathered))
        results = _to_results(merged, dataset.category_ids)
        self._write("predictions.json", results)
        metrics: dict[str, Any] = {}
        for iou_type in self.iou_types:
            found = _coco_metrics(dataset, results, iou_type)
            logger.info("%s, %s\n%s", dataset.annotation_file, iou_type, format_results(found))
            metrics.update(found if iou_type == "bbox" else {iou_type: found})
        self._write("metrics.json", metrics)
        return metrics

    def _require_dataset(self) -> CocoDetection:
        if self._dataset is None:
            raise UserError("call reset(dataset) before giving detections to the evaluator")
        return self._dataset

    def _checked(self, image_id: int, instances: Any) -> _Detections:
        dataset = self._require_dataset()
        boxes_xyxy = instances.pred_boxes.tensor.detach().double().cpu()
        scores = instances.scores.detach().double().cpu()
        classes = instances.pred_classes.detach().cpu()
        if image_id not in self._known_images:
            raise UserError(
                f"image id {image_id} is not in {dataset.annotation_file}; evaluate on the data"
                " set that the images come from"
            )
        if not (boxes_xyxy.isfinite().all() and scores.isfinite().all()):
            raise UserError(
                f"image id {image_id}: a predicted box or score is not finite; the model has"
                " diverged, or overflows in half precision"
            )
        if (classes < 0).any():
            raise UserError(f"image id {image_id}: negative class index {int(classes.min())}")
        known = classes < len(dataset.category_ids)
        self._dropped += int((~known).sum())
        boxes_xywh = boxes_xyxy.clone()
        boxes_xywh[:, 2:] -= boxes_xyxy[:, :2]
        masks = None
        if "segm" in self.iou_types:
            image = dataset.coco.imgs[image_id]
            if not instances.has("pred_masks"):
                raise UserError("iou_types has segm, but the model's instances have no pred_masks")
            shape = (len(classes), image["height"], image["width"])
            if instances.pred_masks.shape != shape:
                raise UserError(
                    f"image id {image_id}: pred_masks have shape"
                    f" {tuple(instances.pred_masks.shape)}, expected {shape}"
                )
            masks = _encode(instances.pred_masks.detach().cpu()[known])
        return _Detections(
            boxes_xywh[known].numpy(), scores[known].numpy(), classes[known].numpy(), masks
        )

    def _warn(self, merged: Mapping[int, Any], repeated: set[int], dropped: int) -> None:
        dataset = self._require_dataset()
        missing = [image_id for image_id in dataset.image_ids if image_id not in merged]
        if repeated:
            logger.warning(
                "%d images were evaluated more than once, the first result counts (image ids %s)",
                len(repeated), first_names(sorted(repeated)),
            )  # fmt: skip
        if missing:
            logger.warning(
                "%d of %d images have no detections because the model never saw them; their"
                " objects count as missed (image ids %s)",
                len(missing), len(dataset), first_names(missing),
            )  # fmt: skip
        if dropped:
            logger.warning(
                "%d detections were dropped because %s has only %d classes and the model more",
                dropped, dataset.annotation_file, len(dataset.category_ids),
            )  # fmt: skip

    def _write(self, name: str, content: Any) -> None:
        if self.output_dir is None:
            return
        file = self.output_dir / name
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:  # a full disk is not worth the training that is evaluated
            logger.error("%s is not written: %s; the results are in the log", file, error.strerror)
            self.unwritten.append(file)
            with contextlib.suppress(OSError):
                file.unlink()  # half of it may be there


def format_results(metrics: Mapping[str, Any]) -> str:
    """A table of the 12 numbers and the AP of every class, in percent; "-" = no ground truth."""
    numbers = [(name, metrics[name]) for name in METRIC_NAMES]
    per_class = metrics["per_class"]
    return "\n".join([*_table(numbers, 6), "AP per class", *_table(per_class.items(), 4)])


def _table(entries: Iterable[tuple[str, float]], columns: int) -> list[str]:
    shown = [(name, "-" if value < 0 else f"{100 * value:.2f}") for name, value in entries]
    width = max(len(name) for name, _ in shown)
    cells = [f"{name:<{width}} {text:>6}" for name, text in shown]
    return ["   ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]


def _is_mask(annotation: Mapping[str, Any], images: Mapping[int, Any]) -> bool:
    """Whether the segmentation of an annotation is a mask that pycocotools can read."""
    mask, image = annotation["segmentation"], images[annotation["image_id"]]
    size = [image["height"], image["width"]]
    if isinstance(mask, dict):
        counts = mask.get("counts")
        if isinstance(counts, list):
            is_read = all(type(n) is int and n >= 0 for n in counts) and sum(counts) == math.prod(
                size
            )
        else:  # digits of 5 bits, the last of each number in 0..O
            is_read = (
                isinstance(counts, str) and re.fullmatch("([P-o]{,6}[0-O])+", counts) is not None
            )
        return is_read and mask.get("size") == size
    try:
        polygons = [np.asarray(polygon, float).reshape(-1, 2) for polygon in mask]
    except (TypeError, ValueError):
        return False
    # Of two points it would make a box if they come first; later ones have no area.
    return len(polygons[0]) > 2 and all(
        len(points) > 0
        and np.abs(points).max() < _FARTHEST
        and np.abs(np.diff(points, axis=0)).sum() < 10 * _FARTHEST
        for points in polygons
    )


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Run-length encodings, which JSON can hold, of (n, height, width) masks."""
    encodings = rle.encode(np.asfortranarray(masks.byte().permute(1, 2, 0).numpy()))
    return [{**encoding, "counts": encoding["counts"].decode()} for encoding in encodings]


def _to_results(
    detections: Mapping[int, _Detections], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections in COCO's result format, in order of image id."""
    results: list[dict[str, Any]] = []
    for image_id in sorted(detections):
        found = detections[image_id]
        boxes, scores, classes = (
            values.tolist() for values in (found.boxes_xywh, found.scores, found.classes)
        )
        masks = [None] * len(boxes) if found.masks is None else found.masks
        for box, score, class_, mask in zip(boxes, scores, classes, masks, strict=True):
            category_id = category_ids[class_]
            result = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            results.append(result if mask is None else {**result, "segmentation": mask})
    return results


def _coco_metrics(
    dataset: CocoDetection, results: list[dict[str, Any]], iou_type: str
) -> dict[str, Any]:
    """The metrics of results, which are numbered and given their area in place."""
    # `COCO.loadRes` does the same, but fails when there are no results.
    for number, result in enumerate(results, start=1):
        _, _, width, height = result["bbox"]
        area = width * height if iou_type == "bbox" else float(rle.area(result["segmentation"]))
        result.update(id=number, area=area)
    detections = COCO()
    detections.dataset = {**dataset.coco.dataset, "annotations": results}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        detections.createIndex()
        evaluation = COCOeval(dataset.coco, detections, iouType=iou_type)
        evaluation.params.imgIds = dataset.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics: dict[str, Any] = dict(zip(METRIC_NAMES, map(float, evaluation.stats), strict=True))
    # (IoU thresholds, recalls, classes, areas, numbers of detections); area 0 is "all"
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    # pycocotools marks undefined entries by -1
    defined = [precision[:, :, c][precision[:, :, c] > -1] for c in range(precision.shape[2])]
    metrics["per_class"] = {
        name: float(values.mean()) if values.size else -1.0
        for name, values in zip(dataset.class_names, defined, strict=True)
    }
    return metrics
