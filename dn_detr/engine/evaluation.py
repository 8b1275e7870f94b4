"""Evaluating a model: as a command, and inside training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from dn_detr.checkpoint import last_checkpoint, load_model_weights
from dn_detr.config import LazyConfig, instantiate
from dn_detr.data import check_num_classes
from dn_detr.distributed import barrier, broadcast_buffers, is_main, world_size
from dn_detr.errors import UserError, first_names
from dn_detr.protocols import Evaluator, NamesResults, TestLoader

from .random_state import preserved_random_state
from .settings import TrainSettings
from .setup import make_folder, prepared, record_run

# Batches between two checks for a stop request, which are collective.
_BATCHES_BETWEEN_CHECKS = 8

logger = logging.getLogger(__name__)


class EvaluationStopped(Exception):
    """An evaluation was abandoned, on all ranks, because one was asked to stop."""


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the weights of `train.init_checkpoint`, else the last ones of `train.output_dir`.

    Args:
        cfg: a whole config. The results and the config go to `train.output_dir/eval`.

    Returns:
        The evaluator's metrics, in [0, 1]; an empty dict on other ranks than the main process.

    Raises:
        ValueError: there is no checkpoint, or it is damaged or of another model, or a run is
            writing to that folder, or the files of the results cannot be written.
    """
    settings = TrainSettings.from_config(cfg)
    checkpoint = settings.init_checkpoint or last_checkpoint(settings.output_dir)
    if not checkpoint:
        raise UserError(
            f"nothing to evaluate: train.init_checkpoint is empty and {settings.output_dir} holds "
            "no checkpoints; set train.init_checkpoint=<checkpoint or output folder>"
        )
    with prepared(settings) as (folder, device):
        if is_main():
            record_run(LazyConfig.to_yaml(cfg), make_folder(folder / "eval"), device)
        logger.info("evaluating %s", checkpoint)
        model = instantiate(cfg.model).to(device)
        loader = instantiate(cfg.dataloader.test)
        check_num_classes(loader.dataset, model.num_classes)
        load_model_weights(model, checkpoint, class_names=loader.dataset.class_names)
        evaluator = instantiate(cfg.dataloader.evaluator)
        results = evaluate_model(model, loader, evaluator)
        if unwritten := getattr(evaluator, "unwritten", None):
            raise UserError(f"{first_names(unwritten)}: not written, see the error above")
        return results


def evaluate_model(
    model: nn.Module,
    loader: TestLoader,
    evaluator: Evaluator,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Evaluate in full precision, without gradients; the model's mode and random numbers stay.

    With several ranks all of them call this, each with its share of the images.

    Args:
        model: a detector, not wrapped by DistributedDataParallel.
        loader: of this rank's share of the test images; its data set defines the ground truth.
        evaluator: receives every prediction, as `dn_detr.evaluation.CocoEvaluator` does.
        should_stop: asked every few batches, equally often on all ranks, and before the metrics
            are computed; it has to answer the same on all of them.

    Returns:
        The evaluator's metrics; an empty dict on other ranks than the main process.

    Raises:
        EvaluationStopped: `should_stop` said so.
    """

    def stop_if_asked() -> None:
        if should_stop is not None and should_stop():
            raise EvaluationStopped

    broadcast_buffers(model)
    was_training = model.training
    # disable=None: a bar in a terminal, nothing in a log file
    disable = None if is_main() else True
    share = math.ceil(len(loader.dataset) / world_size())  # of the largest rank
    with preserved_random_state():
        evaluator.reset(loader.dataset)
        model.eval()
        try:
            with torch.no_grad():
                batches = iter(tqdm(loader, desc="evaluating", leave=False, disable=disable))
                for number in range(math.ceil(share / loader.batch_size)):
                    if number % _BATCHES_BETWEEN_CHECKS == 0:
                        stop_if_asked()
                    if (inputs := next(batches, None)) is not None:
                        evaluator.process(inputs, model(inputs))
        finally:
            model.train(was_training)
        stop_if_asked()
        results = evaluator.evaluate() or {}
    barrier()
    if results:
        numbers = [f"{k} {v:.4g}" for k, v in results.items() if isinstance(v, (int, float))]
        logger.info("results: %s", ", ".join(numbers))
    return results


def check_watched_result(
    watched: str | None, evaluators: Mapping[str, Evaluator], class_names: Sequence[str]
) -> None:
    """Refuse `train.checkpoint.best` at the start, if the evaluators say what they will return."""
    names = [
        f"{prefix}/{name}" if prefix else name
        for prefix, evaluator in evaluators.items()
        if isinstance(evaluator, NamesResults)
        for name in evaluator.result_names(class_names)
    ]
    if watched is not None and names and watched not in names:
        raise UserError(
            f"train.checkpoint.best={watched}: no evaluation has such a result; they have "
            f"{', '.join(names)}"
            + ("; ema/... needs train.ema.enabled=true" if watched.startswith("ema/") else "")
        )
