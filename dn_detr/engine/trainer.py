"""The train loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dn_detr.checkpoint import (
    CheckpointError,
    Manifest,
    load_model_weights,
    load_training_state,
    read_manifest,
    record_metrics,
    save_checkpoint,
)

from .distributed import all_gather, barrier, is_main, rank, world_size
from .errors import NonFiniteError
from .metrics import (
    Interval,
    Row,
    average_over_ranks,
    evaluation_row,
    peak_memory_mib,
)
from .optimizer import group_name, learning_rates
from .progress import Progress
from .random_state import capture_random_state, restore_random_state
from .schedule import LearningRateRule, Timetable, set_learning_rates
from .settings import TrainSettings
from .setup import LOGGER_NAME
from .step import Sample, TrainingStep
from .writers import RunWriters, open_writers

logger = logging.getLogger(f"{LOGGER_NAME}.engine")


class Trainer:
    """Runs optimizer steps until the timetable ends; logs, saves and evaluates when they are due.

    Args:
        model: the detector, not wrapped; what is evaluated and saved.
        step: turns a batch into an updated model.
        loader: endless, of this process's batches.
        device: where the model is.
        timetable: length of the run.
        lr_rule: factor of the learning rate by epoch.
        evaluate: returns the evaluator's metrics (an empty dict on other processes).
        settings: the `train` section.
        config: the resolved config as YAML text, stored in checkpoints.
        class_names: of the training data, stored in checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        step: TrainingStep,
        loader: Any,
        *,
        device: torch.device,
        timetable: Timetable,
        lr_rule: LearningRateRule,
        evaluate: Callable[[], dict[str, Any]],
        settings: TrainSettings,
        config: str = "",
        class_names: Sequence[str] = (),
    ) -> None:
        self.iteration = 0
        self.metrics: dict[str, Any] | None = None
        self._model = model
        self._step = step
        self._loader = loader
        self._device = device
        self._timetable = timetable
        self._lr_rule = lr_rule
        self._evaluate = evaluate
        self._settings = settings
        self._folder = Path(settings.output_dir)
        self._config = config
        self.class_names = list(class_names)
        self._interval = Interval()
        self._random_state: dict[str, Any] | None = None
        self._checkpoint: Path | None = None
        self._writers = RunWriters()

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint as if there had been no interruption.

        Learning rates and other settings of the optimizer are the config's, not the checkpoint's.

        Raises:
            CheckpointError: it is damaged, or of another model or optimizer.
        """
        manifest: Manifest = read_manifest(checkpoint)
        state = load_training_state(checkpoint)
        load_model_weights(self._model, checkpoint, class_names=self.class_names)
        _restore_optimizer(self._step.optimizer, state["optimizer"])
        if state["scaler"] and self._step.scaler.is_enabled():
            self._step.scaler.load_state_dict(state["scaler"])
        self.iteration, self.metrics = manifest.iteration, manifest.metrics
        self._checkpoint = checkpoint
        if len(state["processes"]) == world_size():
            mine = state["processes"][rank()]
            self._random_state = mine["random"]
            self._interval = Interval.from_state_dict(mine["interval"], self._device)
        else:
            logger.warning(
                "saved by %d processes, continued by %d: global random numbers start anew, "
                "samples do not change", len(state["processes"]), world_size(),
            )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Train to the end of the timetable.

        Returns:
            Metrics of the evaluation at the end; an empty dict on other processes than the first.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite.
        """
        with open_writers(
            self._folder, self.iteration, is_evaluated=self.metrics is not None
        ) as self._writers:
            self._evaluate_if_interrupted()
            self._train()
        return self.metrics or {}

    def _train(self) -> None:
        if self.iteration >= self._timetable.max_iter:
            logger.info("nothing left to train: %d iterations are done", self.iteration)
            return
        self._model.train()
        batches = iter(self._loader)
        if self._random_state is not None:
            # after making the iterator, because a loader may draw a seed for its workers
            restore_random_state(self._random_state)
        with Progress(self._timetable, self.iteration, logger) as progress:
            while self.iteration < self._timetable.max_iter:
                self._one_iteration(batches)
                progress.advance()
                self._log_if_due(progress)
                self._save_if_due()
                self._evaluate_if_due()

    def _one_iteration(self, batches: Any) -> None:
        started = time.perf_counter()
        epoch = self._timetable.epoch(self.iteration)
        set_learning_rates(self._step.optimizer, self._lr_rule(epoch, self._timetable.total_epochs))
        batch = next(batches)
        data_seconds = time.perf_counter() - started
        with _images_named_on_failure(batch, self.iteration + 1):
            result = self._step(batch, self.iteration + 1)
        self.iteration += 1
        self.metrics = None
        seconds = time.perf_counter() - started
        self._interval.record(result, images=len(batch), data_seconds=data_seconds, seconds=seconds)

    def _log_if_due(self, progress: Progress) -> None:
        if not self._timetable.is_due(self._settings.log_period, self.iteration):
            return
        memory = {"memory_mib": peak_memory_mib(self._device)}
        row = self._position() | average_over_ranks({**self._interval.averages(), **memory})
        row |= learning_rates(self._step.optimizer)
        self._interval = Interval()
        self._writers.write(row)
        progress.show(row)

    def _save_if_due(self) -> None:
        if not self._timetable.is_due(self._settings.checkpoint.period, self.iteration):
            return
        mine = {"random": capture_random_state(), "interval": self._interval.state_dict()}
        processes = all_gather(mine)
        if is_main():
            self._checkpoint = save_checkpoint(
                self._folder,
                self._model.state_dict(),
                {
                    "optimizer": self._step.optimizer.state_dict(),
                    "scaler": self._step.scaler.state_dict(),
                    "processes": processes,
                },
                iteration=self.iteration,
                epoch=self._timetable.epoch(self.iteration),
                config=self._config,
                class_names=self.class_names,
                keep=self._settings.checkpoint.keep,
            )
            logger.info("saved %s", self._checkpoint)
        barrier()

    def _evaluate_if_due(self) -> None:
        # Saved before: an evaluation that fails or is interrupted costs no training.
        if not self._timetable.is_due(self._settings.eval_period, self.iteration):
            return
        self.metrics = self._evaluate()
        if is_main():
            self._writers.write(self._position() | evaluation_row(self.metrics))
            if self._checkpoint is not None and int(self._checkpoint.name) == self.iteration:
                record_metrics(self._checkpoint, self.metrics)

    def _evaluate_if_interrupted(self) -> None:
        if self.iteration > 0 and self.metrics is None:
            self._evaluate_if_due()

    def _position(self) -> Row:
        epoch = self._timetable.epoch(self.iteration)
        return {"iteration": self.iteration, "epoch": epoch}


@contextmanager
def _images_named_on_failure(batch: Sequence[Sample], iteration: int) -> Iterator[None]:
    """Log which images a failing step worked on; the exception goes on as it is."""
    try:
        yield
    except NonFiniteError:
        raise
    except Exception:
        names = ", ".join(str(sample.get("file_name", "?")) for sample in batch)
        logger.error("iteration %d failed on %s", iteration, names)
        raise


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    present = [(group_name(g), len(g["params"])) for g in optimizer.param_groups]
    saved = [(group_name(g), len(g["params"])) for g in state["param_groups"]]
    if present != saved:
        raise CheckpointError(
            f"the checkpoint's optimizer has the groups (name, tensors) {saved}, the config's "
            f"{present}; resume with the same optimizer.params, or start a new run with "
            "train.init_checkpoint"
        )
    optimizer.load_state_dict(dict(state))
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
