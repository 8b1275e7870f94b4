"""COCO's 12 numbers and the average precision of every class, through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr.data.coco import CocoDetection
from dn_detr.distributed import gather_to_main
from dn_detr.errors import UserError, first_names

_logger = logging.getLogger(__name__)

# In the order of COCOeval.stats.
METRIC_NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip

# (N, 6) of one image: x, y, width, height in pixels, score, class index
Detections = NDArray[np.float64]


class CocoEvaluator:
    """Collects detections, merges them over all processes and computes COCO's metrics.

    What pycocotools does silently or not at all is defined here:

    * no detections: 0 where there is ground truth, -1 where there is none;
    * a box or score that is not finite, a negative class and an unknown image id are errors;
    * a class that the data does not have (of a model with more classes) is dropped, counted and
      warned about;
    * an image that arrives twice, also from two processes, counts once (the first), and images
      that never arrived count as images without detections; both are warned about.

    The ground truth is that of the images in the data set given to ``reset``, so a subset is
    evaluated as if the annotation file had no other images.

    Args:
        output_dir: folder for predictions.json (COCO's result format, original category ids) and
            metrics.json; None = write nothing.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._dataset: CocoDetection | None = None

    def result_names(self, class_names: Sequence[str]) -> list[str]:
        """Names of the results of an evaluation: "AP" and the like, and "per_class/cat"."""
        return [*METRIC_NAMES, *(f"per_class/{name}" for name in class_names)]

    def reset(self, dataset: CocoDetection) -> None:
        """Forget everything and evaluate on ``dataset`` from now on."""
        self._dataset = dataset
        self._known_images = set(dataset.image_ids)
        self._detections: dict[int, Detections] = {}
        self._repeated: set[int] = set()
        self._dropped = 0

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take the detections of a batch.

        Args:
            inputs: samples; only ``image_id`` is read.
            outputs: one dict per sample with ``instances``: ``pred_boxes`` (XYXY, pixels of the
                original image), ``scores`` (N,), ``pred_classes`` (N,) int.

        Raises:
            ValueError: ``reset`` was not called, the numbers of inputs and outputs differ, the
                image is not in the data set, a box or score is not finite, a class is negative.
        """
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} images but {len(outputs)} outputs of the model")
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = int(sample["image_id"])
            detections = self._checked(image_id, output["instances"])
            if image_id in self._detections:
                self._repeated.add(image_id)
            else:
                self._detections[image_id] = detections

    def evaluate(self) -> dict[str, Any] | None:
        """Merge the detections of all processes and compute the metrics on rank 0.

        Returns:
            On rank 0: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as
            pycocotools has them (0 to 1, -1 = no ground truth) and ``per_class``: {name: AP}.
            None on the other ranks.

        Raises:
            ValueError: ``reset`` was not called.
        """
        dataset = self._require_dataset()
        gathered = gather_to_main((self._detections, self._repeated, self._dropped))
        if gathered is None:
            return None
        merged: dict[int, Detections] = {}
        repeated: set[int] = set()
        for detections, seen_twice, _ in gathered:
            repeated |= seen_twice | (merged.keys() & detections.keys())
            merged = detections | merged
        self._warn(merged, repeated, sum(dropped for _, _, dropped in gathered))
        results = _to_results(merged, dataset.category_ids)
        self._write("predictions.json", results)
        metrics = _coco_metrics(dataset, results)
        self._write("metrics.json", metrics)
        _logger.info("%s\n%s", dataset.annotation_file, format_results(metrics))
        return metrics

    def _require_dataset(self) -> CocoDetection:
        if self._dataset is None:
            raise ValueError("call reset(dataset) before giving detections to the evaluator")
        return self._dataset

    def _checked(self, image_id: int, instances: Any) -> Detections:
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
            raise ValueError(f"image id {image_id}: negative class index {int(classes.min())}")
        known = classes < len(dataset.category_ids)
        self._dropped += int((~known).sum())
        size = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
        columns = [boxes_xyxy[:, :2], size, scores[:, None], classes[:, None].double()]
        return torch.cat(columns, dim=1)[known].numpy()

    def _warn(self, merged: Mapping[int, Any], repeated: set[int], dropped: int) -> None:
        dataset = self._require_dataset()
        missing = [image_id for image_id in dataset.image_ids if image_id not in merged]
        if repeated:
            _logger.warning(
                "%d images were evaluated more than once, the first result counts (image ids %s)",
                len(repeated), first_names(sorted(repeated)),
            )  # fmt: skip
        if missing:
            _logger.warning(
                "%d of %d images have no detections because the model never saw them; their"
                " objects count as missed (image ids %s)",
                len(missing), len(dataset), first_names(missing),
            )  # fmt: skip
        if dropped:
            _logger.warning(
                "%d detections were dropped because %s has only %d classes and the model more",
                dropped, dataset.annotation_file, len(dataset.category_ids),
            )  # fmt: skip

    def _write(self, name: str, content: Any) -> None:
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / name).write_text(json.dumps(content), encoding="utf-8")


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


def _to_results(
    detections: Mapping[int, Detections], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections in COCO's result format, in order of image id."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(class_)],
            "bbox": box_xywh,
            "score": score,
        }
        for image_id in sorted(detections)
        for *box_xywh, score, class_ in detections[image_id].tolist()
    ]


def _coco_metrics(dataset: CocoDetection, results: list[dict[str, Any]]) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(dataset.coco, _index(dataset, results), iouType="bbox")
        evaluation.params.imgIds = dataset.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics: dict[str, Any] = dict(zip(METRIC_NAMES, map(float, evaluation.stats), strict=True))
    # (IoU thresholds, recalls, classes, areas, numbers of detections); area 0 is "all"
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    metrics["per_class"] = {
        name: _mean_of_defined(precision[:, :, class_])
        for class_, name in enumerate(dataset.class_names)
    }
    return metrics


def _mean_of_defined(values: NDArray[np.float64]) -> float:
    """Mean without the entries that pycocotools marks as undefined; -1 if there are no others."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _index(dataset: CocoDetection, results: list[dict[str, Any]]) -> COCO:
    """Wrap results in pycocotools' class, numbering them in place.

    ``COCO.loadRes`` does the same for boxes, but fails when there are none.
    """
    for number, result in enumerate(results, start=1):
        _, _, width, height = result["bbox"]
        result.update(id=number, area=width * height)
    coco = COCO()
    coco.dataset = {**dataset.coco.dataset, "annotations": results}
    coco.createIndex()
    return coco
