"""Training as a command: from a config to a trained model in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dn_detr.checkpoint import (
    last_checkpoint,
    load_model_weights,
    log_loading,
    read_manifest,
)
from dn_detr.config import LazyConfig, instantiate
from dn_detr.data import check_num_classes, check_same_categories

from .distributed import barrier, choose_device, is_distributed, is_main, rank
from .evaluation import evaluate_model
from .optimizer import describe_groups
from .random_state import seed_everything
from .schedule import Timetable
from .settings import TrainSettings
from .setup import LOGGER_NAME, announce_device, logging_to, make_folder, record_run
from .step import TrainingStep
from .trainer import Trainer

logger = logging.getLogger(f"{LOGGER_NAME}.engine")


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, save and evaluate what a config describes.

    Args:
        cfg: a whole config: model, dataloader, optimizer, lr_schedule, train.
        resume: continue from `train.output_dir/checkpoints/last`; start anew if there is none.

    Returns:
        Metrics of the evaluation at the end, in [0, 1]; an empty dict on other processes than the
        first.

    Raises:
        ValueError: the config, the data or a checkpoint cannot be used, or `resume` is False and
            the output folder holds the checkpoints of another run.
        NonFiniteError: a loss or gradient became NaN or infinite.
    """
    settings = TrainSettings.from_config(cfg)
    device = choose_device(settings.device)
    seed_everything(settings.seed + rank())
    checkpoint = _starting_point(settings, resume)
    folder = make_folder(settings.output_dir)
    barrier()  # everybody has looked at the folder before anybody writes to it
    with logging_to(folder):
        announce_device(device, settings.device)
        config = LazyConfig.to_yaml(cfg)
        trainer = _build_trainer(cfg, settings, device, checkpoint, config)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            _log_resumption(checkpoint, config)
        elif resume:
            logger.info("nothing to resume in %s: starting a new run", folder)
        if is_main():  # only now: a refused start leaves the record of the run before as it was
            record_run(config, folder, device)
        return trainer.run()


def _starting_point(settings: TrainSettings, resume: bool) -> Path | None:
    checkpoint = last_checkpoint(settings.output_dir)
    if checkpoint is not None and not resume:
        raise ValueError(
            f"{settings.output_dir} holds a run with {read_manifest(checkpoint).iteration} "
            "iterations: add --resume to continue it, choose another train.output_dir, or delete it"
        )
    return checkpoint


def _build_trainer(
    cfg: DictConfig,
    settings: TrainSettings,
    device: torch.device,
    checkpoint: Path | None,
    config: str,
) -> Trainer:
    start = read_manifest(checkpoint).iteration if checkpoint else 0
    train_loader = instantiate(cfg.dataloader.train, start_iteration=start)
    test_loader = instantiate(cfg.dataloader.test)
    check_same_categories(train_loader.dataset, test_loader.dataset)
    class_names = train_loader.dataset.class_names
    model = _build_model(cfg, settings, device, class_names, is_new=checkpoint is None)
    check_num_classes(train_loader.dataset, cast(int, model.num_classes))
    evaluator = instantiate(cfg.dataloader.evaluator)
    timetable = Timetable.plan(
        train_loader.batch_sampler.iterations_per_epoch, settings.epochs, settings.max_iter
    )
    logger.info("%d iterations, %d per epoch", timetable.max_iter, timetable.iterations_per_epoch)
    return Trainer(
        model,
        _build_step(cfg, settings, model, device),
        train_loader,
        device=device,
        timetable=timetable,
        lr_rule=instantiate(cfg.lr_schedule),
        evaluate=partial(evaluate_model, model, test_loader, evaluator),
        settings=settings,
        config=config,
        class_names=class_names,
    )


def _build_model(
    cfg: DictConfig,
    settings: TrainSettings,
    device: torch.device,
    class_names: Sequence[str],
    *,
    is_new: bool,
) -> nn.Module:
    model: nn.Module = instantiate(cfg.model).to(device)
    if settings.init_checkpoint and is_new:
        report = load_model_weights(
            model, settings.init_checkpoint, class_names=class_names, fine_tune=True
        )
        log_loading(settings.init_checkpoint, report)
    elif is_new and is_main():  # the other processes get the first one's weights
        load_pretrained_parts(model)
    return model


def load_pretrained_parts(model: nn.Module) -> None:
    """Let every part that has pretrained weights (a backbone) load them.

    A part offers this with a method `load_pretrained() -> bool`. Building a model alone loads
    nothing, so that a checkpoint can be put into it without a network.
    """
    for name, part in model.named_modules():
        if hasattr(part, "load_pretrained") and part.load_pretrained():
            logger.info("%s starts from pretrained weights: %s", name, getattr(part, "weights", ""))


def _build_step(
    cfg: DictConfig, settings: TrainSettings, model: nn.Module, device: torch.device
) -> TrainingStep:
    groups = instantiate(cfg.optimizer.params, model=model)
    optimizer = instantiate(cfg.optimizer, params=groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    logger.info("optimizer %s\n%s", type(optimizer).__name__, describe_groups(optimizer))
    return TrainingStep(
        _distribute(model, device),
        optimizer,
        device=device,
        amp=settings.amp,
        clip_grad=settings.clip_grad,
    )


def _distribute(model: nn.Module, device: torch.device) -> nn.Module:
    if not is_distributed():
        return model
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            logger.warning(
                "trainable batch normalisation over several CPU processes: each normalises with "
                "its own images, so a step is not that of one process (torch synchronises it on "
                "GPUs only)"
            )
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _log_resumption(checkpoint: Path, config: str) -> None:
    logger.info("resuming from %s", checkpoint)
    saved = read_manifest(checkpoint).config
    for change in config_changes(saved, config) if saved and config else []:
        logger.warning("changed since that checkpoint: %s", change)


def config_changes(before: str, after: str) -> list[str]:
    """Return "key: old -> new" for every leaf that differs between two configs in YAML."""
    old, new = (dict(_leaves(yaml.load(text, yaml.BaseLoader))) for text in (before, after))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, "absent") != new.get(key, "absent")
    ]


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, (dict, list)) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
