"""Callbacks: what happens beside the training, the library's own and the user's.

A config adds one under a name, `train.callbacks.NAME=L(MyCallback)(...)`; nothing else is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from dn_detr.protocols import Sample

if TYPE_CHECKING:
    from .metrics import Record
    from .run_state import RunState
    from .step import StepResult

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Callback:
    """Base class: every hook does nothing; override those that you need.

    Every rank has its own object, and its hooks are called in the same order on every rank, so
    they may communicate (`torch.distributed`); only `on_log` is called on the main process alone.
    An exception ends the training, after the log has named the callback.

    The hooks get the state of the run: `state.model` (not wrapped), `state.optimizer`,
    `state.iteration` (steps done), `state.timetable` (lengths in iterations and epochs),
    `state.metrics` (add numbers of your own to the next log record), `state.results` (of the
    evaluation after this step, if there was one), `state.output_dir`.
    """

    def setup(self, state: RunState) -> None:
        """Make what needs the model, before a checkpoint is loaded into it."""

    def on_train_start(self, state: RunState) -> None:
        """Begin: the run is complete, of a resumed one the checkpoint is loaded."""

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Follow a step, also one that changed no weight.

        Numbers that are added here by `state.metrics.add` and `state.metrics.count` become columns
        of the next log record, averaged or summed over its iterations and all ranks, and a resumed
        run continues them exactly.

        Args:
            state: after the step.
            samples: of this rank.
            result: losses, gradient norm and diagnostics, on the device; `result.outcome` says
                whether weights changed.
        """

    def on_log(self, state: RunState, record: Record) -> None:
        """Take a log record, as metrics.jsonl has it; on the main process only.

        Args:
            state: after the step.
            record: with `iteration`; of an evaluation, its numbers are named `eval/...`.
        """

    def after_evaluation(self, state: RunState, results: Mapping[str, Any]) -> None:
        """Take the results of an evaluation, the same on every rank."""

    def on_train_end(self, state: RunState, *, failed: bool) -> None:
        """Close what `on_train_start` opened; called however the run ends.

        Args:
            state: at the end.
            failed: whether an exception ends the run. A run that is stopped on request did not
                fail.
        """

    def models(self) -> Mapping[str, nn.Module]:
        """Return further models by name, always the same names.

        Each is evaluated beside the trained model, with its results under NAME/, and its weights
        are saved and restored: those of "ema" as ema.safetensors, others with the training state.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers, strings, and lists and dicts of them.

        It is called on every rank and may communicate; what the main process returns is saved.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`: before `on_train_start`, and after a rollback."""


class Callbacks(Callback):
    """Several callbacks as one, whose errors name the callback in the log.

    Args:
        callbacks: by name, in the order of their calls.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self._callbacks = dict(callbacks)
        self._started: list[str] = []

    def setup(self, state: RunState) -> None:
        """See `Callback`."""
        self._call_each(lambda callback: callback.setup(state))

    def on_train_start(self, state: RunState) -> None:
        """See `Callback`."""
        for name in self._callbacks:
            self._started.append(name)
            self._call(name, lambda callback: callback.on_train_start(state))

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """See `Callback`."""
        self._call_each(lambda callback: callback.after_step(state, samples, result))

    def on_log(self, state: RunState, record: Record) -> None:
        """See `Callback`."""
        self._call_each(lambda callback: callback.on_log(state, record))

    def after_evaluation(self, state: RunState, results: Mapping[str, Any]) -> None:
        """See `Callback`."""
        self._call_each(lambda callback: callback.after_evaluation(state, results))

    def on_train_end(self, state: RunState, *, failed: bool) -> None:
        """End the callbacks that were started, also if one of them fails at that."""
        with ExitStack() as stack:
            for name in reversed(self._started):
                stack.callback(
                    self._call, name, lambda callback: callback.on_train_end(state, failed=failed)
                )

    def models(self) -> dict[str, nn.Module]:
        """See `Callback`."""
        found = self._call_each(lambda callback: callback.models())
        return {name: model for models in found.values() for name, model in models.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of those callbacks that have one, by name."""
        states = self._call_each(lambda callback: callback.state_dict())
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; states of callbacks that are no longer there are dropped."""
        for name in filter(state.__contains__, self._callbacks):
            own = state[name]
            self._call(name, lambda callback: callback.load_state_dict(own))  # noqa: B023

    def _call_each(self, hook: Callable[[Callback], T]) -> dict[str, T]:
        return {name: self._call(name, hook) for name in self._callbacks}

    def _call(self, name: str, hook: Callable[[Callback], T]) -> T:
        callback = self._callbacks[name]
        try:
            return hook(callback)
        except Exception:
            logger.error("callback %s (%s) failed", name, type(callback).__name__)
            raise
