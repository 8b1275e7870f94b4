"""COCO metrics of a detector."""

from __future__ import annotations

from .coco import CocoEvaluator as CocoEvaluator
from .coco import format_results as format_results
