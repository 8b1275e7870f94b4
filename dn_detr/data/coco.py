"""COCO detection data as samples of the model's input protocol."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from dn_detr.errors import first_names
from dn_detr.structures import Boxes, Instances

from .annotations import Entry, read_annotation_file, require_image_files, require_paths
from .errors import DatasetError
from .image import read_image
from .seeding import stable_seed
from .transforms import Sample, Transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotationReport:
    """What reading an annotation file found.

    Attributes:
        images: number of images.
        images_without_boxes: images that have no box to train on; they are kept.
        boxes: boxes that can be trained on.
        clipped_boxes: how many of these reached over the border of their image and were clipped.
        crowd_boxes: regions marked `iscrowd`; never trained on, but the evaluator has them.
        empty_boxes: ids of annotations with zero or negative width or height, skipped.
        outside_boxes: ids of annotations completely outside their image, skipped.
        renumbered: whether the annotation ids were renumbered because one was 0.
    """

    images: int
    images_without_boxes: int
    boxes: int
    clipped_boxes: int
    crowd_boxes: int
    empty_boxes: tuple[int, ...]
    outside_boxes: tuple[int, ...]
    renumbered: bool


@dataclass(frozen=True)
class _BoxTable:
    """All boxes to train on, image by image.

    Flat arrays instead of the JSON's dictionaries: workers read them without touching the
    reference count of a million objects, which would copy the memory that they share.
    """

    boxes_xyxy: NDArray[np.float32]  # (M, 4) absolute pixels
    classes: NDArray[np.int64]  # (M,) contiguous from 0
    entries: NDArray[np.int64]  # (M,) position in the file's list of annotations
    first: NDArray[np.int64]  # (N + 1,) image i has the rows first[i] to first[i + 1]


class CocoDetection(Dataset[Sample]):
    """A detection data set in COCO's format, checked completely when it is opened.

    `dataset[i]` or `dataset[epoch, i]` is a dict with

        image: (3, H, W) uint8 RGB after the transforms
        height, width: size of the original image in pixels
        image_id: int; file_name: full path
        seed: int in [0, 2**63), a function of (seed, epoch, index); every random draw on this
            sample, here and in the model, derives from it
        instances: only if `train`; `gt_boxes` XYXY in pixels of `image`, `gt_classes`
            and `gt_ids` int64, a number in [0, num_boxes) that an object keeps in all epochs

    Images are in order of their id, images without boxes included. Classes are contiguous from 0
    in order of category id. Boxes that reach over the border are clipped; crowd regions, boxes
    without area and boxes outside the image are not trained on, and `report` counts them. The
    ground truth of the evaluation, `coco`, is what the file says, so that its numbers are
    comparable with others', with one exception: if an annotation id is 0, all are renumbered
    from 1, because pycocotools takes a match with id 0 for no match.

    Args:
        image_dir: folder that `file_name` in the JSON is relative to.
        annotation_file: COCO instances JSON.
        transforms: see `dn_detr.data.transforms`; None = the image as it is.
        train: whether samples carry `instances`.
        seed: of all random draws on samples.

    Attributes:
        class_names: name of each class.
        category_ids: original category id of each class.
        image_ids: image id of each index.
        image_sizes: (height, width) of each index, pixels.
        coco: pycocotools' object with all images and all ground truth.
        report: an `AnnotationReport`.

    Raises:
        DatasetError: names the file, the ids and the remedy. See docs/data.md for all checks.
    """

    def __init__(
        self,
        image_dir: str | Path,
        annotation_file: str | Path,
        transforms: Transform | None = None,
        *,
        train: bool,
        seed: int = 0,
    ) -> None:
        self.image_dir, self.annotation_file = Path(image_dir), Path(annotation_file)
        self.transforms = transforms
        self.train = train
        self.seed = seed
        require_paths(self.image_dir, self.annotation_file)
        content = read_annotation_file(self.annotation_file)
        images = sorted(content["images"], key=lambda image: image["id"])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.image_ids: list[int] = [image["id"] for image in images]
        self.image_sizes: list[tuple[int, int]] = [(i["height"], i["width"]) for i in images]
        self.category_ids: list[int] = [category["id"] for category in categories]
        self.class_names: list[str] = [category["name"] for category in categories]
        self._file_names: list[str] = [image["file_name"] for image in images]
        require_image_files(self.image_dir, self._file_names)
        self._boxes, self.report = self._tabulate(content["annotations"])
        if self.report.renumbered:
            for number, annotation in enumerate(content["annotations"], start=1):
                annotation["id"] = number
        self.coco = COCO()
        self.coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):  # it prints progress
            self.coco.createIndex()
        self._explain_report()

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        """Number of boxes to train on."""
        return int(self._boxes.first[len(self)])

    def image_path(self, index: int) -> Path:
        """The file of an image."""
        return self.image_dir / self._file_names[index]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        height, width = self.image_sizes[index]
        path = self.image_path(index)
        seed = stable_seed(self.seed, epoch, index)
        sample: Sample = {
            "image": read_image(path, expected_size=(height, width)),
            "height": height,
            "width": width,
            "image_id": self.image_ids[index],
            "file_name": str(path),
            "seed": seed,
        }
        if self.train:
            sample["instances"] = Instances((height, width), **self.ground_truth(index))
        if self.transforms is not None:
            sample = self.transforms(sample, random.Random(seed))
        sample["image"] = pil_to_tensor(sample["image"])
        if self.train:
            boxes_xyxy = sample["instances"].gt_boxes
            kept = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
            # Indexing gives plain tensors: nothing moves with the image any more.
            sample["instances"] = instances = sample["instances"][kept]
            instances.gt_boxes = Boxes(instances.gt_boxes)
        return sample

    def ground_truth(self, index: int) -> dict[str, Any]:
        """Fields of the objects in an image that are trained on, before the transforms.

        A subclass adds fields of its own, from `annotations(index)`. They become fields of the
        sample's `instances`. A `torchvision.tv_tensors.TVTensor`, such as a `Mask` (n, height,
        width), moves with the image; objects that a crop removes lose their entry in every field.

        Returns:
            `gt_boxes` (n, 4) XYXY in pixels of the original image, `gt_classes` (n,) int64 and
            `gt_ids` (n,) int64, all of them copies.
        """
        rows = slice(self._boxes.first[index], self._boxes.first[index + 1])
        return {
            "gt_boxes": BoundingBoxes(
                torch.from_numpy(self._boxes.boxes_xyxy[rows].copy()),
                format=BoundingBoxFormat.XYXY,
                canvas_size=self.image_sizes[index],
            ),
            "gt_classes": torch.from_numpy(self._boxes.classes[rows].copy()),
            "gt_ids": torch.arange(rows.start, rows.stop),
        }

    def annotations(self, index: int) -> list[Entry]:
        """The entries of the file for the objects of `ground_truth(index)`, in the same order."""
        rows = slice(self._boxes.first[index], self._boxes.first[index + 1])
        entries = self.coco.dataset["annotations"]
        return [entries[position] for position in self._boxes.entries[rows]]

    def subset(self, count: int) -> CocoDetection:
        """This data set restricted to its first `count` images (all, if it has fewer).

        Raises:
            ValueError: `count` is not positive, or leaves no box to train on.
        """
        if count < 1:
            raise ValueError(f"a data set needs at least one image, got limit={count}")
        if self.train and self._boxes.first[min(count, len(self))] == 0:
            raise DatasetError(
                f"{self.annotation_file}: the first {count} images have no box to train on; "
                "raise dataloader.train.limit"
            )
        restricted = copy.copy(self)
        restricted.image_ids = self.image_ids[:count]
        return restricted

    def _tabulate(self, annotations: list[Entry]) -> tuple[_BoxTable, AnnotationReport]:
        index_of = {image_id: index for index, image_id in enumerate(self.image_ids)}
        class_of = {category_id: class_ for class_, category_id in enumerate(self.category_ids)}
        image_index = np.array([index_of[a["image_id"]] for a in annotations], np.int64)
        classes = np.array([class_of[a["category_id"]] for a in annotations], np.int64)
        crowd = np.array([a["iscrowd"] for a in annotations], bool)
        ids = np.array([a["id"] for a in annotations], object)
        corners = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        limits = np.array(self.image_sizes, np.float32)[image_index][:, [1, 0, 1, 0]]
        clipped = np.clip(corners, 0, limits)

        has_area = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        trained = has_area & ~crowd
        has_size = (corners[:, 2:] > corners[:, :2]).all(axis=1)
        rows = np.flatnonzero(trained)
        rows = rows[np.argsort(image_index[rows], kind="stable")]
        first = np.searchsorted(image_index[rows], np.arange(len(self.image_ids) + 1))
        report = AnnotationReport(
            images=len(self.image_ids),
            images_without_boxes=int((np.diff(first) == 0).sum()),
            boxes=len(rows),
            clipped_boxes=int((clipped != corners)[rows].any(axis=1).sum()),
            crowd_boxes=int(crowd.sum()),
            empty_boxes=tuple(ids[~crowd & ~has_size]),
            outside_boxes=tuple(ids[~crowd & has_size & ~has_area]),
            renumbered=bool((ids == 0).any()),
        )
        return _BoxTable(clipped[rows], classes[rows], rows, first), report

    def _explain_report(self) -> None:
        """Log once what was skipped, and refuse to train on nothing."""
        file, report = self.annotation_file, self.report
        for problem, ids in (
            ("zero or negative width or height", report.empty_boxes),
            ("no overlap with their image", report.outside_boxes),
        ):
            if ids:
                logger.warning(
                    "%s: %d boxes have %s and are not trained on (annotation ids %s); in an"
                    " evaluation they count as missed objects",
                    file, len(ids), problem, first_names(ids),
                )  # fmt: skip
        sizes = self._boxes.boxes_xyxy[:, 2:] - self._boxes.boxes_xyxy[:, :2]
        doubt = None
        if len(sizes) and sizes.max() <= 1:
            doubt = "no box is larger than one pixel: are they relative numbers?"
        elif 2 * report.clipped_boxes > report.boxes:
            doubt = (
                f"{report.clipped_boxes} of {report.boxes} boxes reach over the border of their"
                " image and are clipped: are they corners?"
            )
        if doubt:
            logger.warning("%s: %s; boxes have to be [x, y, width, height] in pixels", file, doubt)
        if report.renumbered:
            logger.info(
                "%s: annotation ids were renumbered in memory, because pycocotools counts"
                " a detection that matches annotation id 0 as wrong",
                file,
            )
        if self.train and report.boxes == 0:
            raise DatasetError(f"{file}: there is no box to train on; annotate some objects")
        if not self.coco.anns:
            logger.warning("%s: no annotations, so all metrics will be -1 (undefined)", file)


def check_num_classes(dataset: CocoDetection, num_classes: int) -> None:
    """Check a model's number of classes against a data set.

    Fewer classes in the data than in the model give one warning.

    Raises:
        DatasetError: the data has more classes than the model.
    """
    in_data = len(dataset.class_names)
    if in_data > num_classes:
        raise DatasetError(
            f"{dataset.annotation_file} has {in_data} classes"
            f" ({first_names(dataset.class_names)}), the model {num_classes};"
            f" set model.num_classes={in_data}"
        )
    if in_data < num_classes:
        logger.warning(
            "%s has %d classes, the model %d: the last %d have no data"
            " (model.num_classes=%d avoids it)",
            dataset.annotation_file, in_data, num_classes, num_classes - in_data, in_data,
        )  # fmt: skip


def check_same_categories(train: CocoDetection, test: CocoDetection) -> None:
    """Check that a class index means the same in two data sets.

    Class indices follow from the categories of each annotation file, so a test file that lists
    only some of them would silently shift all others.

    Raises:
        DatasetError: the lists of categories differ.
    """
    first = dict(zip(train.category_ids, train.class_names, strict=True))
    second = dict(zip(test.category_ids, test.class_names, strict=True))
    if first != second:
        different = sorted(set(first.items()) ^ set(second.items()))
        raise DatasetError(
            f"{train.annotation_file} and {test.annotation_file} have different categories, first"
            f" differences (id, name): {first_names(different)}; give both files the same list"
        )
