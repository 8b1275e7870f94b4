"""Training as a command: from a config to a trained model in a folder."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dn_detr.allocator import keep_freed_memory
from dn_detr.checkpoint import (
    CheckpointWriter,
    LoadedCheckpoint,
    last_checkpoint,
    load_model_weights,
    log_loading,
    read_manifest,
)
from dn_detr.config import LazyConfig, instantiate
from dn_detr.data import check_num_classes, check_same_categories
from dn_detr.distributed import broadcast_from_main, is_distributed, is_main, rank, world_size
from dn_detr.errors import UserError, user_message

from .best import BestResult
from .devices import choose_device
from .ema import averaged_model
from .evaluation import build_evaluators, check_watched_result, evaluate_all
from .lock import sole_run
from .optimizer import describe_groups
from .random_state import seed_everything
from .run_state import RunState, load_last
from .schedule import Timetable
from .settings import TrainSettings
from .setup import (
    NEVER_IN_TERMINAL,
    announce_device,
    logging_to,
    make_folder,
    record_run,
)
from .stability import MatchingStability
from .step import TrainingStep
from .stopping import Stopped, StopRequest
from .trainer import Trainer
from .writers import open_writers

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, save and evaluate what a config describes.

    Args:
        cfg: a whole config: model, dataloader, optimizer, lr_schedule, train.
        resume: continue from `train.output_dir/checkpoints/last`; start anew if there is none.

    Returns:
        Metrics of the last evaluation, in [0, 1], those of the averaged weights under "ema"; an
        empty dict on other processes than the first.

    Raises:
        ValueError: the config, the data or a checkpoint cannot be used, or `resume` is False and
            the output folder holds the checkpoints of another run.
        NonFiniteError: a loss or gradient became NaN or infinite.
        OutOfMemory: a step did not fit into memory.
        Stopped: a signal or `train.max_hours` asked for it; a checkpoint is written.
    """
    settings = TrainSettings.from_config(cfg)
    keep_freed_memory()
    with StopRequest(settings.grace_seconds, settings.max_hours) as stop:
        device = choose_device(settings.device)
        seed_everything(settings.seed + rank())
        folder = make_folder(settings.output_dir)
        with logging_to(folder), _end_logged(), sole_run(folder) if is_main() else nullcontext():
            checkpoint = _starting_point(settings, resume)
            announce_device(device, settings.device)
            config = LazyConfig.to_yaml(cfg)
            if checkpoint is not None:  # first: what changed explains what then does not fit
                _log_resumption(checkpoint, config)
            elif resume:
                logger.warning("nothing to resume in %s: starting a new run", folder)
            trainer = _build_trainer(cfg, settings, device, checkpoint, config, stop)
            del checkpoint  # its memory: all of it is in the trainer now
            stop.begin_training()
            if is_main():  # only now: a refused start leaves the record of the run before as it was
                record_run(config, folder, device)
            return trainer.run()


@contextmanager
def _end_logged() -> Iterator[None]:
    """Leave in the log why a run ends; the terminal gets that from whoever catches it."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if is_main():
            text = user_message(error) if isinstance(error, UserError) else traceback.format_exc()
            logger.error("%s", text, extra=NEVER_IN_TERMINAL)
        raise


def _starting_point(settings: TrainSettings, resume: bool) -> LoadedCheckpoint | None:
    """Return the checkpoint to continue from; a collective call."""
    if resume:
        return load_last(settings.output_dir)
    present = broadcast_from_main(last_checkpoint(settings.output_dir) if is_main() else None)
    if present is not None:
        raise UserError(
            f"{settings.output_dir} holds a run with {read_manifest(present).iteration} "
            "iterations: add --resume to continue it, choose another train.output_dir, or delete it"
        )
    return None


def _build_trainer(
    cfg: DictConfig,
    settings: TrainSettings,
    device: torch.device,
    checkpoint: LoadedCheckpoint | None,
    config: str,
    stop: StopRequest,
) -> Trainer:
    train_loader = instantiate(cfg.dataloader.train)
    test_loader = instantiate(cfg.dataloader.test)
    check_same_categories(train_loader.dataset, test_loader.dataset)
    class_names = train_loader.dataset.class_names
    model = _build_model(cfg, settings, device, class_names, is_new=checkpoint is None)
    check_num_classes(train_loader.dataset, cast(int, model.num_classes))
    timetable = Timetable.plan(
        train_loader.batch_sampler.iterations_per_epoch, settings.epochs, settings.max_iter
    )
    logger.info("%d iterations, %d per epoch", timetable.max_iter, timetable.iterations_per_epoch)
    accumulate = _plan_pieces(
        settings.accumulate, train_loader.batch_sampler.total_batch_size, model
    )
    step = _build_step(cfg, settings, model, device, accumulate)
    state = _build_state(settings, model, step, train_loader.dataset)
    if checkpoint is not None:
        state.restore(checkpoint)
        train_loader.batch_sampler.start_iteration = state.batches_drawn
    models = {"": model} | ({"ema": state.ema.module} if state.ema is not None else {})
    evaluators = build_evaluators(cfg, models)
    check_watched_result(settings.checkpoint.best, evaluators, class_names)
    checkpoints = CheckpointWriter(
        settings.output_dir,
        config=config,
        class_names=class_names,
        keep=settings.checkpoint.keep,
        asynchronous=settings.checkpoint.asynchronous,
        rank=rank(),
    )
    checkpoints.require_writable()
    return Trainer(
        state,
        train_loader,
        checkpoints,
        open_rows=partial(
            open_writers,
            Path(settings.output_dir),
            wandb=settings.wandb,
            config=yaml.safe_load(config),
        ),
        evaluate=partial(evaluate_all, models, test_loader, evaluators),
        stop=stop,
        timetable=timetable,
        lr_rule=instantiate(cfg.lr_schedule),
        settings=settings,
    )


def _build_state(
    settings: TrainSettings, model: nn.Module, step: TrainingStep, dataset: Any
) -> RunState:
    watched, stopping = settings.checkpoint.best, settings.early_stopping
    return RunState(
        model,
        step,
        class_names=dataset.class_names,
        ema=averaged_model(model, settings.ema.decay) if settings.ema.enabled else None,
        best=BestResult(watched, stopping.patience, stopping.min_delta) if watched else None,
        stability=MatchingStability(dataset.num_boxes) if hasattr(dataset, "num_boxes") else None,
    )


def _plan_pieces(wanted: int, total_batch_size: int, model: nn.Module) -> int:
    """Return in how many pieces every process computes its images; say what a step is made of."""
    smallest, largest = total_batch_size // world_size(), -(-total_batch_size // world_size())
    pieces = min(wanted, smallest)  # the same everywhere, as synchronised normalisation needs it
    if not is_main():
        return pieces
    if pieces < wanted:
        logger.warning(
            "train.accumulate=%d: a process has %d images of a step, which are computed in %d "
            "pieces", wanted, smallest, pieces,
        )  # fmt: skip
    least, most = smallest // pieces, -(-largest // pieces)
    logger.info(
        "each step: %d images = %d process(es) x %d piece(s) of %s", total_batch_size,
        world_size(), pieces, least if least == most else f"{least} to {most}",
    )  # fmt: skip
    if pieces > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        logger.warning(
            "train.accumulate=%d: trainable batch normalisation normalises with the images of a "
            "piece, so a step is not quite that of the whole batch", wanted,
        )  # fmt: skip
    return pieces


def _build_model(
    cfg: DictConfig,
    settings: TrainSettings,
    device: torch.device,
    class_names: Sequence[str],
    *,
    is_new: bool,
) -> nn.Module:
    model: nn.Module = instantiate(cfg.model).to(device)
    _checkpoint_activations(model, settings)
    if settings.init_checkpoint and is_new:
        report = load_model_weights(
            model, settings.init_checkpoint, class_names=class_names, fine_tune=True
        )
        log_loading(settings.init_checkpoint, report)
    elif is_new and is_main():  # the other processes get the first one's weights
        load_pretrained_parts(model)
    return model


def _checkpoint_activations(model: nn.Module, settings: TrainSettings) -> None:
    parts = asdict(settings.activation_checkpointing)
    if not any(parts.values()):
        return
    if not hasattr(model, "checkpoint_activations"):
        raise UserError(
            f"train.activation_checkpointing: {type(model).__name__} has no method "
            "checkpoint_activations"
        )
    cast(Any, model).checkpoint_activations(**parts)


def load_pretrained_parts(model: nn.Module) -> None:
    """Let every part that has pretrained weights (a backbone) load them.

    A part offers this with a method `load_pretrained() -> bool`. Building a model alone loads
    nothing, so that a checkpoint can be put into it without a network.
    """
    for name, part in model.named_modules():
        if hasattr(part, "load_pretrained") and part.load_pretrained():
            logger.info("%s starts from pretrained weights: %s", name, getattr(part, "weights", ""))


def _build_step(
    cfg: DictConfig,
    settings: TrainSettings,
    model: nn.Module,
    device: torch.device,
    accumulate: int,
) -> TrainingStep:
    groups = instantiate(cfg.optimizer.params, model=model)
    optimizer = instantiate(cfg.optimizer, params=groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    logger.info("optimizer %s\n%s", type(optimizer).__name__, describe_groups(optimizer))
    survives_out_of_memory = settings.oom == "skip"
    return TrainingStep(
        _distribute(model, device, broadcasts_buffers=not survives_out_of_memory),
        optimizer,
        device=device,
        amp=settings.amp,
        clip_grad=settings.clip_grad,
        accumulate=accumulate,
        survive_out_of_memory=survives_out_of_memory,
        survive_nonfinite=settings.nonfinite != "raise",
    )


def _distribute(model: nn.Module, device: torch.device, *, broadcasts_buffers: bool) -> nn.Module:
    if not is_distributed():
        return model
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif is_main() and world_size() > 1:
            logger.warning(
                "trainable batch normalisation over several CPU processes: each normalises with "
                "its own images, so a step is not that of one process (torch synchronises it on "
                "GPUs only)"
            )
    wrapped = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    # They are sent at the start of a step, where nobody must wait for a process without memory. As
    # an attribute, because the argument has another name from PyTorch 2.14 on.
    wrapped.broadcast_buffers = broadcasts_buffers
    return wrapped


def _log_resumption(checkpoint: LoadedCheckpoint, config: str) -> None:
    logger.info("resuming from %s", checkpoint.folder)
    saved = checkpoint.manifest.config
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
