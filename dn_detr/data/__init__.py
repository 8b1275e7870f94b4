"""From COCO JSON and image files to batches: reading, checking, augmentation, loaders."""

from __future__ import annotations

from .coco import AnnotationReport as AnnotationReport
from .coco import CocoDetection as CocoDetection
from .coco import check_num_classes as check_num_classes
from .coco import check_same_categories as check_same_categories
from .errors import DatasetError as DatasetError
from .errors import ImageError as ImageError
from .image import read_image as read_image
from .loaders import build_test_loader as build_test_loader
from .loaders import build_train_loader as build_train_loader
from .loaders import raise_open_file_limit as raise_open_file_limit
from .samplers import EndlessBatchSampler as EndlessBatchSampler
from .seeding import stable_seed as stable_seed
from .skipping import SkipBrokenImages as SkipBrokenImages
from .skipping import count_skipped as count_skipped
from .skipping import describe_skipped as describe_skipped
from .transforms import test_transforms as test_transforms
from .transforms import train_transforms as train_transforms
