"""Running a model over a data set."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dn_detr.data.coco import CocoDetection, Sample
from dn_detr.data.samplers import rank_and_world_size

from .coco import CocoEvaluator


def inference_on_dataset(
    model: nn.Module, loader: DataLoader[Sample], evaluator: CocoEvaluator
) -> dict[str, Any] | None:
    """Evaluate a model, in evaluation mode and without gradients; its mode is restored.

    With several processes all of them call this, each with its share of the images.

    Args:
        model: takes ``list[dict]`` and returns ``list[{"instances": Instances}]``.
        loader: of ``build_test_loader``; its data set defines the ground truth.
        evaluator: receives every prediction.

    Returns:
        Metrics of ``CocoEvaluator.evaluate`` on rank 0, None on the other ranks.
    """
    was_training = model.training
    evaluator.reset(cast(CocoDetection, loader.dataset))
    # disable=None: a bar in a terminal, nothing in a log file
    disable = None if rank_and_world_size()[0] == 0 else True
    model.eval()
    try:
        with torch.no_grad():
            for inputs in tqdm(loader, desc="evaluating", leave=False, disable=disable):
                evaluator.process(inputs, model(inputs))
    finally:
        model.train(was_training)
    return evaluator.evaluate()
