"""Evaluating a model: as a command, and inside training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from dn_detr.checkpoint import (
    find_checkpoint,
    last_checkpoint,
    load_model_weights,
    read_manifest,
)
from dn_detr.config import LazyConfig, instantiate
from dn_detr.data import check_num_classes
from dn_detr.evaluation import inference_on_dataset

from .distributed import barrier, broadcast_buffers, choose_device, is_main, rank
from .random_state import preserved_random_state, seed_everything
from .settings import TrainSettings
from .setup import LOGGER_NAME, logging_to, make_folder, record_run

logger = logging.getLogger(f"{LOGGER_NAME}.engine")


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the weights of `train.init_checkpoint`, else the last ones of `train.output_dir`.

    Args:
        cfg: a whole config. The results and the config go to `train.output_dir/eval`.

    Returns:
        The evaluator's metrics, in [0, 1]; an empty dict on other processes than the first.

    Raises:
        ValueError: there is no checkpoint, or it is damaged or of another model.
    """
    settings = TrainSettings.from_config(cfg)
    device = choose_device(settings.device)
    seed_everything(settings.seed + rank())
    checkpoint = _weights_to_evaluate(settings)
    folder = make_folder(settings.output_dir)
    with logging_to(folder):
        if is_main():
            record_run(LazyConfig.to_yaml(cfg), make_folder(folder / "eval"), device)
        logger.info("evaluating %s", checkpoint)
        model = instantiate(cfg.model).to(device)
        load_model_weights(model, checkpoint)
        loader = instantiate(cfg.dataloader.test)
        check_num_classes(loader.dataset, model.num_classes)
        check_class_names(checkpoint, loader.dataset.class_names)
        return evaluate_model(model, loader, instantiate(cfg.dataloader.evaluator))


def evaluate_model(model: nn.Module, loader: Any, evaluator: Any) -> dict[str, Any]:
    """Evaluate in full precision and leave the random numbers as they were.

    Args:
        model: a detector, not wrapped by DistributedDataParallel.
        loader: of this process's share of the test images.
        evaluator: as `dn_detr.evaluation.CocoEvaluator`.

    Returns:
        The evaluator's metrics; an empty dict on other processes than the first.
    """
    broadcast_buffers(model)
    with preserved_random_state():
        results = inference_on_dataset(model, loader, evaluator)
    barrier()
    return results or {}


def check_class_names(checkpoint: str | Path, class_names: Sequence[str]) -> None:
    """Check that class indices mean the same to the weights and to the data.

    A file of bare weights does not say what its classes are, and passes.

    Args:
        checkpoint: as for `load_model_weights`.
        class_names: of the data.

    Raises:
        ValueError: the checkpoint was trained on other classes, or on another order of them.
    """
    if Path(checkpoint).is_file():
        return
    trained = read_manifest(find_checkpoint(checkpoint)).class_names
    if trained and trained != list(class_names):
        pairs = enumerate(zip_longest(trained, class_names))
        index, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"{checkpoint} was trained on {len(trained)} classes, the data has "
            f"{len(class_names)}: class {index} was {before!r} and now is {now!r}. Give both "
            "annotation files the same list of categories"
        )


def _weights_to_evaluate(settings: TrainSettings) -> str | Path:
    checkpoint = settings.init_checkpoint or last_checkpoint(settings.output_dir)
    if not checkpoint:
        raise ValueError(
            f"nothing to evaluate: train.init_checkpoint is empty and {settings.output_dir} holds "
            "no checkpoints; set train.init_checkpoint=<checkpoint or output folder>"
        )
    return checkpoint
