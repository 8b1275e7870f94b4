"""From COCO JSON and image files to batches: reading, checking, augmentation, loaders."""

from __future__ import annotations

from .coco import AnnotationReport, CocoDetection, check_num_classes, check_same_categories
from .errors import DatasetError, ImageError
from .image import read_image
from .loaders import build_test_loader, build_train_loader, raise_open_file_limit
from .samplers import EndlessBatchSampler
from .seeding import stable_seed
from .skipping import SkipBrokenImages, count_skipped, describe_skipped
from .transforms import test_transforms, train_transforms

__all__ = [
    "AnnotationReport",
    "CocoDetection",
    "DatasetError",
    "EndlessBatchSampler",
    "ImageError",
    "SkipBrokenImages",
    "build_test_loader",
    "build_train_loader",
    "check_num_classes",
    "check_same_categories",
    "count_skipped",
    "describe_skipped",
    "raise_open_file_limit",
    "read_image",
    "stable_seed",
    "test_transforms",
    "train_transforms",
]
