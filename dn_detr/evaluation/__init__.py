"""COCO metrics of a detector."""

from __future__ import annotations

from .coco import CocoEvaluator, format_results
from .inference import EvaluationStopped, inference_on_dataset

__all__ = ["CocoEvaluator", "EvaluationStopped", "format_results", "inference_on_dataset"]
