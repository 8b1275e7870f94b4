"""The state of a run: what a checkpoint holds and a resumed run continues from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from dn_detr.errors import UserError

from .best import BestResult
from .callbacks import Callbacks
from .metrics import RunningSums
from .optimizer import group_name
from .random_state import capture_random_state, preserved_random_state, restore_random_state
from .schedule import Timetable
from .step import TrainingStep

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class RunState:
    """What changes during a run: a snapshot of it is a checkpoint.

    Args:
        model: the detector, not wrapped.
        step: with the optimizer and the loss scale.
        timetable: length of the run.
        output_dir: folder of the run.
        class_names: of the training data.
        callbacks: what happens beside the training.
        best: the best evaluation.

    Attributes:
        iteration: steps done.
        batches_drawn: batches taken from the loader; more than `iteration` after a rollback.
        nonfinite_steps: steps dropped because numbers were not finite.
        metrics: numbers of this rank since the last log record.
        log_records: written until the last checkpoint, on the main process.
        results: of the evaluation at `iteration`, None if there was none.
    """

    model: nn.Module
    step: TrainingStep
    timetable: Timetable
    output_dir: Path
    class_names: Sequence[str]
    callbacks: Callbacks
    best: BestResult
    iteration: int = 0
    batches_drawn: int = 0
    nonfinite_steps: int = 0
    metrics: RunningSums = field(default_factory=RunningSums)
    log_records: int = 0
    results: Mapping[str, Any] | None = None
    _random_state: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.callbacks.each(lambda callback: callback.setup(self))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the step."""
        return self.step.optimizer

    def snapshot(self) -> Snapshot:
        """Return the whole state, equal on all ranks; a collective call."""
        of_this_rank = {"random": capture_random_state(), "metrics": self.metrics.state_dict()}
        models = {name: m.state_dict() for name, m in self.callbacks.models().items()}
        return Snapshot(
            iteration=self.iteration,
            epoch=self.timetable.epoch(self.iteration),
            model=self.model.state_dict(),
            ema=models.pop("ema", None),
            optimizer=self.optimizer.state_dict(),
            training_state={
                "optimizer_type": type(self.optimizer).__name__,
                "scaler": self.step.scaler.state_dict(),
                "best": self.best.state_dict(before_latest=self.results is not None),
                "callbacks": self.callbacks.state_dict(),
                "models": models,
                "batches_drawn": self.batches_drawn,
                "nonfinite_steps": self.nonfinite_steps,
                "log_records": self.log_records,
                "ranks": all_gather(of_this_rank),
            },
        )

    def restore(self, checkpoint: LoadedCheckpoint) -> None:
        """Become what a checkpoint holds, as if there had been no interruption.

        Learning rates and other settings of the optimizer stay the config's. Random numbers are
        restored by `restore_random_numbers`, when nothing draws any more before the next step.

        Raises:
            CheckpointError: it is of another model or optimizer, or holds no state of a run.
        """
        try:
            self._restore(checkpoint)
        except UserError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}: its state does not fit into this run: {error!r}; use another"
                " checkpoint, or start a new run from its weights with train.init_checkpoint"
            ) from error

    def _restore(self, checkpoint: LoadedCheckpoint) -> None:
        saved, manifest = checkpoint.snapshot, checkpoint.manifest
        state = saved.training_state
        what = str(checkpoint.folder)
        load_tensors(self.model, checkpoint.weights, what=what, class_names=self.class_names)
        for name, model in self.callbacks.models().items():
            weights = saved.ema if name == "ema" else state["models"].get(name)
            if weights is None:
                logger.warning("the checkpoint holds no %s: it starts from the model's", name)
            model.load_state_dict(dict(saved.model if weights is None else weights))
        _restore_optimizer(self.optimizer, state["optimizer_type"], saved.optimizer)
        if state["scaler"] and self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        self.callbacks.load_state_dict(state["callbacks"])
        self.iteration, self.results = manifest.iteration, manifest.metrics
        self.best.load_state_dict(state["best"])
        if self.results and not self.best.is_in(self.results):
            self.results = None  # evaluated before that result was asked for
        self.fall_back_to_best_checkpoint()
        if self.results is not None:
            self.best.update(self.results)
        self.batches_drawn = int(state["batches_drawn"])
        self.nonfinite_steps = int(state["nonfinite_steps"])
        self.log_records = int(state.get("log_records", 0))
        ranks = state["ranks"]
        self.metrics = RunningSums()
        if len(ranks) == world_size():
            self._random_state = ranks[rank()]["random"]
            with preserved_random_state():
                restore_random_state(self._random_state)  # fails now, not at the first step
            self.metrics.add_state(ranks[rank()]["metrics"], self.step.device)
            return
        logger.warning(
            "saved by %d process(es), continued by %d: global random numbers are "
            "re-initialised, samples do not change", len(ranks), world_size(),
        )  # fmt: skip
        for saved in ranks if is_main() else []:
            self.metrics.add_state(saved["metrics"], self.step.device)

    def fall_back_to_best_checkpoint(self) -> None:
        """Judge later results by what `best` points at, if a better one was not written."""
        kept = best_manifest(self.output_dir / "checkpoints")
        self.best.fall_back_to(kept.metrics if kept is not None else None)

    def restore_random_numbers(self) -> None:
        """Continue with the random numbers that follow those of the restored checkpoint."""
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None


def load_last(output_dir: str | Path) -> LoadedCheckpoint | None:
    """Load the last undamaged checkpoint of a run on every rank; a collective call.

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
