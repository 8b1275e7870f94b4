"""Running a model over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dn_detr.distributed import is_main, world_size
from dn_detr.protocols import Evaluator, TestLoader

# Batches between two checks for a stop request, which are collective.
_BATCHES_BETWEEN_CHECKS = 8


class EvaluationStopped(Exception):
    """An evaluation was abandoned, on all ranks, because one was asked to stop."""


def inference_on_dataset(
    model: nn.Module,
    loader: TestLoader,
    evaluator: Evaluator,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a model, in evaluation mode and without gradients; its mode is restored.

    With several ranks all of them call this, each with its share of the images.

    Args:
        model: takes `list[dict]` and returns `list[{"instances": Instances}]`.
        loader: of `build_test_loader`; its data set defines the ground truth.
        evaluator: receives every prediction.
        should_stop: asked every few batches, equally often on all ranks, and before the metrics
            are computed; it has to answer the same on all of them.

    Returns:
        Metrics of `CocoEvaluator.evaluate` on the main process, None on the other ranks.

    Raises:
        EvaluationStopped: `should_stop` said so.
    """
    was_training = model.training
    evaluator.reset(loader.dataset)
    # disable=None: a bar in a terminal, nothing in a log file
    disable = None if is_main() else True
    share = math.ceil(len(loader.dataset) / world_size())  # of the largest rank
    num_batches = math.ceil(share / loader.batch_size)
    model.eval()
    try:
        with torch.no_grad():
            batches = iter(tqdm(loader, desc="evaluating", leave=False, disable=disable))
            for number in range(num_batches):
                if number % _BATCHES_BETWEEN_CHECKS == 0:
                    _stop_if(should_stop)
                if (inputs := next(batches, None)) is not None:
                    evaluator.process(inputs, model(inputs))
    finally:
        model.train(was_training)
    _stop_if(should_stop)
    return evaluator.evaluate()


def _stop_if(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise EvaluationStopped
