"""Running a model over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dn_detr.data.coco import CocoDetection, Sample
from dn_detr.distributed import is_main, world_size

from .coco import CocoEvaluator

# How many batches lie between two questions whether to stop, which all processes answer together.
_BATCHES_BETWEEN_QUESTIONS = 8


class EvaluationStopped(Exception):
    """An evaluation was abandoned, on all processes, because one was asked to stop."""


def inference_on_dataset(
    model: nn.Module,
    loader: DataLoader[Sample],
    evaluator: CocoEvaluator,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model, in evaluation mode and without gradients; its mode is restored.

    With several processes all of them call this, each with its share of the images.

    Args:
        model: takes ``list[dict]`` and returns ``list[{"instances": Instances}]``.
        loader: of ``build_test_loader``; its data set defines the ground truth.
        evaluator: receives every prediction.
        should_stop: asked now and then, equally often on all ranks, and before the metrics are
            computed; it has to answer the same on all of them.

    Returns:
        Metrics of ``CocoEvaluator.evaluate`` on rank 0, None on the other ranks.

    Raises:
        EvaluationStopped: ``should_stop`` said so.
    """
    was_training = model.training
    evaluator.reset(cast(CocoDetection, loader.dataset))
    # disable=None: a bar in a terminal, nothing in a log file
    disable = None if is_main() else True
    model.eval()
    try:
        with torch.no_grad():
            batches = iter(tqdm(loader, desc="evaluating", leave=False, disable=disable))
            for number in range(_most_batches(loader)):
                if number % _BATCHES_BETWEEN_QUESTIONS == 0:
                    _stop_if(should_stop)
                if (inputs := next(batches, None)) is not None:
                    evaluator.process(inputs, model(inputs))
    finally:
        model.train(was_training)
    _stop_if(should_stop)
    return evaluator.evaluate()


def _most_batches(loader: DataLoader[Sample]) -> int:
    """The number of batches of the rank that has the most images."""
    images = len(cast(CocoDetection, loader.dataset))
    share = math.ceil(images / world_size())
    return math.ceil(share / cast(int, loader.batch_size))


def _stop_if(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise EvaluationStopped
