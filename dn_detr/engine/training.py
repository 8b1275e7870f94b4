"""Training as a command: from a config to a trained model in a folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from dn_detr.checkpoint import (
    LoadedCheckpoint,
    last_checkpoint,
    read_manifest,
)
from dn_detr.config import ConfigError, LazyConfig
from dn_detr.config.nodes import plain, walk
from dn_detr.config.yaml_file import read_yaml
from dn_detr.distributed import broadcast_from_main, is_main
from dn_detr.errors import UserError

from .best import BestResult
from .build import (
    build_callbacks,
    build_checkpoint_writer,
    build_evaluator,
    build_loaders,
    build_model,
    build_optimizer,
    build_schedule,
    build_step,
)
from .evaluation import check_watched_result
from .run_state import RunState, load_last
from .schedule import parse_period
from .settings import CheckpointSettings, TrainSettings
from .setup import prepared, record_run
from .stopping import StopRequest
from .trainer import Trainer

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, save and evaluate what a config describes.

    Args:
        cfg: a whole config: model, dataloader, optimizer, lr_schedule, train.
        resume: continue from `train.output_dir/checkpoints/last`, or start if there is none.

    Returns:
        Metrics of the last evaluation, in [0, 1], those of the EMA under "ema"; an empty dict on
        other ranks than the main process.

    Raises:
        ValueError: the config, the data or a checkpoint cannot be used, or `resume` is False and
            the output folder holds the checkpoints of another run.
        NonFiniteError: a loss or gradient became NaN or infinite.
        OutOfMemory: a step did not fit into memory.
        Stopped: a signal or `train.max_hours` asked for it; a checkpoint is written.
    """
    settings = TrainSettings.from_config(cfg)
    stop = StopRequest(settings.grace_seconds, settings.max_hours)
    with prepared(settings) as (folder, device):
        checkpoint = _starting_point(settings, resume)
        config = LazyConfig.to_yaml(cfg)
        if checkpoint is not None:  # first: what changed explains what then does not fit
            logger.info("resuming from %s", checkpoint.folder)
            for change in config_changes(checkpoint.manifest.config or config, config):
                logger.warning("changed since that checkpoint: %s", change)
        elif resume:
            logger.warning("nothing to resume in %s: starting a new run", folder)
        trainer = build_trainer(cfg, device, stop, checkpoint)
        del checkpoint  # its memory: all of it is in the trainer now
        with stop:  # from now on a signal is a request to save
            if is_main():  # only now: a refused start leaves the record of the run before as it was
                record_run(config, folder, device)
            return trainer.run()


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


def build_trainer(
    cfg: DictConfig,
    device: torch.device,
    stop: StopRequest,
    checkpoint: LoadedCheckpoint | None = None,
) -> Trainer:
    """Build all that a training needs.

    Args:
        cfg: a whole config.
        device: of this rank.
        stop: whether this process was asked to stop.
        checkpoint: to continue from.

    Raises:
        ValueError: something of the config or the checkpoint cannot be used.
    """
    settings = TrainSettings.from_config(cfg)
    train_loader, test_loader = build_loaders(cfg)
    sampler, dataset = train_loader.batch_sampler, train_loader.dataset
    model = build_model(cfg, device, dataset, load_weights=checkpoint is None)
    timetable, lr_rule = build_schedule(cfg, train_loader)
    optimizer = build_optimizer(cfg, model)
    watched, stopping = settings.checkpoint.best, settings.early_stopping
    state = RunState(
        model,
        build_step(cfg, model, optimizer, device, sampler.total_batch_size),
        timetable,
        output_dir=Path(settings.output_dir),
        class_names=dataset.class_names,
        callbacks=build_callbacks(cfg, dataset),
        best=BestResult(watched, stopping.patience, stopping.min_delta),
    )
    if checkpoint is not None:
        state.restore(checkpoint)
        sampler.start_iteration = state.batches_drawn
    checkpoints = build_checkpoint_writer(cfg, dataset)
    if is_main():
        warn_of_small_disk(state, settings.checkpoint)
    evaluators = {name: build_evaluator(cfg, name) for name in ("", *state.callbacks.models())}
    check_watched_result(watched, evaluators, dataset.class_names)
    return Trainer(
        state,
        train_loader,
        test_loader,
        evaluators,
        checkpoints,
        stop=stop,
        lr_rule=lr_rule,
        settings=settings,
    )


def warn_of_small_disk(state: RunState, settings: CheckpointSettings) -> None:
    """Compare what the checkpoints of a run take with what is free; Adam's state is assumed."""
    weights = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    trained = sum(p.nbytes for p in state.model.parameters() if p.requires_grad)
    each = weights * (1 + len(state.callbacks.models())) + 2 * trained
    timetable, folder = state.timetable, state.output_dir / "checkpoints"
    every = parse_period(settings.period, timetable.iterations_per_epoch) or timetable.max_iter
    saves = -(-timetable.max_iter // every)
    written = len(list(folder.glob("[0-9]*")))
    count = min(saves, settings.keep or saves) + 2 - written  # the best, and one in the making
    free = shutil.disk_usage(folder).free
    if free < count * each:
        logger.warning(
            "%s: %.0f MiB are free, and %d checkpoints of this run take about %.0f MiB: make room,"
            " or lower train.checkpoint.keep", folder, free / 2**20, count, count * each / 2**20,
        )  # fmt: skip


def config_changes(before: str, after: str) -> list[str]:
    """Return "key: old -> new" for every leaf that differs between two configs in YAML."""
    try:
        old, new = (
            {key: value for key, value in walk(plain(read_yaml(text, "config")))
             if value in ({}, []) or not isinstance(value, (dict, list))}
            for text in (before, after)
        )  # fmt: skip
    except ConfigError as error:  # the checkpoint is of somebody else, or the config is huge
        return [f"what cannot be told: {error}"]
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in old | new
        if old.get(key, "absent") != new.get(key, "absent")
    ]
