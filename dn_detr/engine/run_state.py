"""All that a run is made of at one moment, to be saved and to be continued from."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dn_detr.checkpoint import (
    CheckpointError,
    LoadedCheckpoint,
    Snapshot,
    best_manifest,
    load_checkpoint,
    load_last_checkpoint,
    load_tensors,
)
from dn_detr.distributed import all_gather, broadcast_from_main, is_main, rank, world_size

from .best import BestResult
from .metrics import Interval
from .optimizer import group_name
from .random_state import capture_random_state, restore_random_state
from .stability import MatchingStability
from .step import TrainingStep

logger = logging.getLogger(__name__)


class RunState:
    """What changes during a run: a snapshot of it is a checkpoint.

    Args:
        model: the detector, not wrapped.
        step: with the optimizer and the loss scale.
        class_names: of the training data.
        ema: the moving average of the model, if there is one.
        best: the best evaluation, if one result is watched.
        stability: follows the matching, if the data know their objects.
        callbacks: name -> object with `state_dict` and `load_state_dict`, whose states are saved
            and restored under these names.

    Attributes:
        iteration: steps done.
        batches_drawn: batches taken from the loader; more than `iteration` after a rollback.
        nonfinite_steps: steps dropped because numbers were not finite.
        skipped: files that were skipped in this epoch -> how often, on this process.
        metrics: results of the evaluation at `iteration`, None if there was none.
        is_best: whether `metrics` are the best so far.
        interval: numbers since the last row.
    """

    def __init__(
        self,
        model: nn.Module,
        step: TrainingStep,
        *,
        class_names: Sequence[str],
        ema: AveragedModel | None = None,
        best: BestResult | None = None,
        stability: MatchingStability | None = None,
        callbacks: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.step = step
        self.ema = ema
        self.best = best
        self.stability = stability
        self.callbacks = dict(callbacks or {})
        self.iteration = 0
        self.batches_drawn = 0
        self.nonfinite_steps = 0
        self.skipped: Counter[str] = Counter()
        self.metrics: dict[str, Any] | None = None
        self.is_best = False
        self.interval = Interval()
        self._class_names = class_names
        self._best_before: dict[str, Any] | None = None  # the state of `best` before `metrics`
        self._random_state: dict[str, Any] | None = None

    def snapshot(self, epoch: float) -> Snapshot:
        """Return the whole state, equal on all processes; a collective call."""
        mine = {
            "random": capture_random_state(),
            "interval": self.interval.state_dict(),
            "skipped": dict(self.skipped),
        }
        return Snapshot(
            iteration=self.iteration,
            epoch=epoch,
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict() if self.ema is not None else None,
            optimizer=self.step.optimizer.state_dict(),
            training_state={
                "optimizer_type": type(self.step.optimizer).__name__,
                "scaler": self.step.scaler.state_dict(),
                "best": self._best_before_evaluation(),
                "stability": self.stability.state_dict() if self.stability is not None else None,
                "callbacks": {name: c.state_dict() for name, c in self.callbacks.items()},
                "batches_drawn": self.batches_drawn,
                "nonfinite_steps": self.nonfinite_steps,
                "processes": all_gather(mine),
            },
        )

    @property
    def has_stagnated(self) -> bool:
        """Whether the last evaluations gained nothing."""
        return self.best is not None and self.best.has_stagnated

    def take_results(self) -> None:
        """Compare `metrics` with the best so far."""
        self.is_best = False
        if self.best is not None and self.metrics is not None:
            self._best_before = self.best.state_dict()
            self.is_best = self.best.update(self.metrics)

    def forget_lost_best(self, checkpoints: Path) -> None:
        """Judge later results by what `best` points at, where the best so far was not written."""
        if self.best is not None:
            kept = best_manifest(checkpoints)
            self.best.forget_unless_kept(kept.metrics if kept is not None else None)

    def _best_before_evaluation(self) -> dict[str, Any] | None:
        """Return the state of `best` without the evaluation at this iteration.

        The evaluation may come after the checkpoint, and is recorded in its manifest or made again;
        so that it counts once, a checkpoint that is written after it holds the same.
        """
        if self.best is None:
            return None
        return self.best.state_dict() if self.metrics is None else self._best_before

    def restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Become what a checkpoint holds, as if there had been no interruption.

        Learning rates and other settings of the optimizer stay the config's. Random numbers are
        restored by `restore_random_numbers`, when nothing draws any more before the next step.

        Raises:
            CheckpointError: it is of another model or optimizer.
        """
        saved, manifest = checkpoint.snapshot, checkpoint.manifest
        state = saved.training_state
        load_tensors(
            self.model,
            saved.model,
            what=str(checkpoint.folder),
            class_names=self._class_names,
            source_class_names=manifest.class_names,
            has_config=bool(manifest.config),
        )
        if self.ema is not None:
            if saved.ema is None:
                logger.warning("the checkpoint holds no EMA: it starts from the model's weights")
            self.ema.module.load_state_dict(dict(saved.model if saved.ema is None else saved.ema))
        _restore_optimizer(self.step.optimizer, state["optimizer_type"], saved.optimizer)
        if state["scaler"] and self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        if self.stability is not None and state["stability"] is not None:
            self.stability.load_state_dict(state["stability"])
        for name, callback in self.callbacks.items():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        self.iteration, self.metrics = manifest.iteration, manifest.metrics
        if self.best is not None and state["best"] is not None:
            self.best.load_state_dict(state["best"])
        if self.best is not None and self.metrics and not self.best.is_in(self.metrics):
            self.metrics = None  # evaluated before that result was asked for
        self.forget_lost_best(checkpoint.folder.parent)
        self.take_results()
        self.batches_drawn = state["batches_drawn"]
        self.nonfinite_steps = state["nonfinite_steps"]
        if len(state["processes"]) != world_size():
            logger.warning(
                "saved by %d process(es), continued by %d: global random numbers are "
                "re-initialised, samples do not change", len(state["processes"]), world_size(),
            )  # fmt: skip
            return
        mine = state["processes"][rank()]
        self._random_state = mine["random"]
        self.interval = Interval.from_state_dict(mine["interval"], self.step.device)
        self.skipped = Counter(mine["skipped"])

    def restore_random_numbers(self) -> None:
        """Continue with the random numbers that follow those of the restored checkpoint."""
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None


def load_last(output_dir: str | Path) -> LoadedCheckpoint | None:
    """Load the last undamaged checkpoint of a run on every process; a collective call.

    The main process looks for it, and the others load what it has found.

    Returns:
        None if the run has saved none.
    """
    found = load_last_checkpoint(output_dir) if is_main() else None
    folder = broadcast_from_main(found.folder if found is not None else None)
    if found is not None or folder is None:
        return found
    return load_checkpoint(folder)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, saved_type: str, state: Mapping[str, Any]
) -> None:
    if type(optimizer).__name__ != saved_type:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved_type}, the config's {type(optimizer).__name__}, "
            "which has no use for its state; resume with the same optimizer, or start a new run "
            "with train.init_checkpoint"
        )
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
