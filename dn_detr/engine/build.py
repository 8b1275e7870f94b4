"""The parts of a training, each built from a whole config by one function.

`dn_detr.engine.train` is made of them, and so is a train loop of your own: see
`examples/own_training_loop.py`.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dn_detr.checkpoint import CheckpointWriter, load_model_weights
from dn_detr.config import LazyConfig, instantiate
from dn_detr.data import check_num_classes, check_same_categories
from dn_detr.distributed import is_distributed, is_main, rank, world_size
from dn_detr.errors import UserError
from dn_detr.protocols import (
    CheckpointsActivations,
    Evaluator,
    HasBoxTable,
    LoadsPretrained,
    Model,
    TestLoader,
    TrainLoader,
)

from .callbacks import (
    Callback,
    Callbacks,
    DenoisingMetrics,
    ExponentialMovingAverage,
    Progress,
    SkippedFiles,
)
from .optimizer import describe_groups
from .schedule import LearningRateRule, Timetable
from .settings import TrainSettings
from .stability import MatchingStability
from .step import TrainingStep
from .writers import TensorBoard, WeightsAndBiases

logger = logging.getLogger(__name__)


def build_loaders(cfg: DictConfig) -> tuple[TrainLoader, TestLoader]:
    """Build the training and the test loader of this rank.

    Raises:
        ValueError: their data sets disagree in their classes.
    """
    train_loader = instantiate(cfg.dataloader.train)
    test_loader = instantiate(cfg.dataloader.test)
    check_same_categories(train_loader.dataset, test_loader.dataset)
    return train_loader, test_loader


def build_schedule(cfg: DictConfig, loader: TrainLoader) -> tuple[Timetable, LearningRateRule]:
    """Return the length of the training and the factor of its learning rate by epoch.

    Args:
        cfg: a whole config.
        loader: of the training; it knows the iterations of an epoch.
    """
    settings = TrainSettings.from_config(cfg)
    timetable = Timetable.plan(
        loader.batch_sampler.iterations_per_epoch, settings.epochs, settings.max_iter
    )
    logger.info("%d iterations, %d per epoch", timetable.max_iter, timetable.iterations_per_epoch)
    return timetable, instantiate(cfg.lr_schedule)


def build_model(
    cfg: DictConfig, device: torch.device, dataset: Any, *, load_weights: bool = True
) -> nn.Module:
    """Build a model for training.

    Args:
        cfg: a whole config.
        device: where the model goes.
        dataset: of the training; the model has to have its classes.
        load_weights: load `train.init_checkpoint`, or else, on the main process, the pretrained
            weights of the model's parts (a backbone). False: a checkpoint will be loaded into it.

    Raises:
        ValueError: it is no detector or has too few classes, weights do not fit, or
            `train.activation_checkpointing` asks for what the model cannot do.
    """
    settings = TrainSettings.from_config(cfg)
    model: Any = instantiate(cfg.model)
    if not (isinstance(model, nn.Module) and isinstance(model, Model)):
        raise UserError(
            f"model is of type {type(model).__name__}; let its _target_ make an nn.Module with "
            "num_classes, see dn_detr.protocols.Model"
        )
    model.to(device)
    check_num_classes(dataset, model.num_classes)
    parts = asdict(settings.activation_checkpointing)
    if any(parts.values()):
        if not isinstance(model, CheckpointsActivations):
            raise UserError(
                f"train.activation_checkpointing: {type(model).__name__} has no method "
                "checkpoint_activations"
            )
        model.checkpoint_activations(**parts)
    if load_weights and settings.init_checkpoint:
        load_model_weights(
            model,
            settings.init_checkpoint,
            class_names=dataset.class_names,
            fine_tune=True,
            fresh=settings.init_fresh,
        )
    elif load_weights and is_main():  # the other ranks get the main process's weights
        for name, part in model.named_modules():
            if isinstance(part, LoadsPretrained) and part.load_pretrained():
                weights = getattr(part, "weights", "")
                logger.info("%s starts from pretrained weights: %s", name, weights)
    built: nn.Module = model
    return built


def build_optimizer(cfg: DictConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer of a model; each group keeps its learning rate as `initial_lr`."""
    groups = instantiate(cfg.optimizer.params, model=model)
    optimizer: Optimizer = instantiate(cfg.optimizer, params=groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    logger.info("optimizer %s\n%s", type(optimizer).__name__, describe_groups(optimizer))
    return optimizer


def build_step(
    cfg: DictConfig,
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    total_batch_size: int,
) -> TrainingStep:
    """Build what turns a batch into an updated model, on any number of ranks.

    Args:
        cfg: a whole config.
        model: on `device`; it is wrapped by DistributedDataParallel if there is a process group.
        optimizer: of the model.
        device: of this rank.
        total_batch_size: images of a step over all ranks.
    """
    settings = TrainSettings.from_config(cfg)
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    accumulate = _plan_micro_batches(settings.accumulate, total_batch_size, has_batch_norm)
    survives_out_of_memory = settings.oom == "skip"
    if is_distributed():
        if has_batch_norm and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif has_batch_norm and is_main() and world_size() > 1:
            logger.warning(
                "trainable batch normalisation over several CPU processes: each normalises with "
                "its own images, so a step is not that of one process (torch synchronises it on "
                "GPUs only)"
            )
        model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
        # They are sent at the start of a step, where no rank must wait for one without memory. As
        # an attribute, because the argument has another name from PyTorch 2.14 on.
        model.broadcast_buffers = not survives_out_of_memory
    return TrainingStep(
        model,
        optimizer,
        device=device,
        amp=settings.amp,
        clip_grad=settings.clip_grad,
        accumulate=accumulate,
        survive_out_of_memory=survives_out_of_memory,
        survive_nonfinite=settings.nonfinite != "raise",
    )


def _plan_micro_batches(wanted: int, total_batch_size: int, has_batch_norm: bool) -> int:
    """Return in how many micro-batches every rank computes its images; log what a step is."""
    smallest, largest = total_batch_size // world_size(), -(-total_batch_size // world_size())
    count = min(wanted, smallest)  # the same everywhere, as synchronised normalisation needs it
    if not is_main():
        return count
    if count < wanted:
        logger.warning(
            "train.accumulate=%d: a rank has %d images of a step, which are computed in %d "
            "micro-batches", wanted, smallest, count,
        )  # fmt: skip
    least, most = smallest // count, -(-largest // count)
    logger.info(
        "each step: %d images = %d rank(s) x %d micro-batch(es) of %s", total_batch_size,
        world_size(), count, least if least == most else f"{least} to {most}",
    )  # fmt: skip
    if count > 1 and has_batch_norm:
        logger.warning(
            "train.accumulate=%d: trainable batch normalisation normalises with the images of a "
            "micro-batch, so a step is not quite that of the whole batch", wanted,
        )  # fmt: skip
    return count


def build_evaluator(cfg: DictConfig, name: str = "") -> Evaluator:
    """Build the evaluator.

    Args:
        cfg: a whole config.
        name: of a model that is evaluated beside the trained one ("ema"); its results go to a
            folder of that name below `output_dir` of the evaluator.
    """
    node = copy.deepcopy(cfg.dataloader.evaluator)
    if name and node.get("output_dir"):
        node.output_dir = str(Path(node.output_dir) / name)
    evaluator: Evaluator = instantiate(node)
    return evaluator


def build_checkpoint_writer(cfg: DictConfig, dataset: Any) -> CheckpointWriter:
    """Build what writes the checkpoints of `train.output_dir`, on the main process.

    Args:
        cfg: a whole config; it is kept in every checkpoint.
        dataset: of the training; so are its class names.

    Raises:
        CheckpointError: checkpoints cannot be written there.
    """
    settings = TrainSettings.from_config(cfg)
    writer = CheckpointWriter(
        settings.output_dir,
        config=LazyConfig.to_yaml(cfg),
        class_names=dataset.class_names,
        keep=settings.checkpoint.keep,
        asynchronous=settings.checkpoint.asynchronous,
        rank=rank(),
    )
    writer.require_writable()
    return writer


def build_callbacks(cfg: DictConfig, dataset: Any) -> Callbacks:
    """Build the library's callbacks and those of `train.callbacks`, which come last.

    Args:
        cfg: a whole config.
        dataset: of the training.

    Raises:
        ValueError: an entry of `train.callbacks` has the name of one of the library's, or is no
            `Callback`.
    """
    settings = TrainSettings.from_config(cfg)
    callbacks: dict[str, Callback] = {}
    if settings.ema.enabled:
        callbacks["ema"] = ExponentialMovingAverage(settings.ema.decay)
    callbacks["denoising_metrics"] = DenoisingMetrics()
    if isinstance(dataset, HasBoxTable):
        callbacks["matching_stability"] = MatchingStability(dataset.num_boxes)
    callbacks["skipped_files"] = SkippedFiles()
    callbacks["tensorboard"] = TensorBoard()
    if settings.wandb.enabled:
        config = yaml.safe_load(LazyConfig.to_yaml(cfg))
        callbacks["wandb"] = WeightsAndBiases(settings.wandb, config)
    callbacks["progress"] = Progress()
    for name, node in (cfg.train.get("callbacks") or {}).items():
        if name in callbacks:
            raise UserError(f"train.callbacks.{name}: the library has a callback of that name")
        callback = instantiate(node)
        if not isinstance(callback, Callback):
            raise UserError(
                f"train.callbacks.{name}: expected a dn_detr.engine.Callback, not "
                f"{type(callback).__name__}"
            )
        callbacks[name] = callback
    return Callbacks(callbacks)
