"""Callbacks: what happens beside the training, the library's own and the user's.

A config adds one under a name, `train.callbacks.NAME=L(MyCallback)(...)`; nothing else is needed.
The larger ones of the library are in `stability.py` and `writers.py`.
"""

from __future__ import annotations

import datetime
import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from dn_detr.config.errors import did_you_mean
from dn_detr.data import count_skipped, describe_skipped
from dn_detr.distributed import all_gather, is_main
from dn_detr.errors import UserError
from dn_detr.protocols import Sample

from .metrics import Record
from .setup import FILE_ONLY
from .step import Outcome, StepResult

if TYPE_CHECKING:
    from .run_state import RunState

T = TypeVar("T")

_HOOK = re.compile(r"(before|after|on)_")
_DENOISING_TERM = re.compile(r"_dn(_\d+)?$")  # loss_ce_dn, loss_ce_dn_0

logger = logging.getLogger(__name__)


class Callback:
    """Base class: every hook does nothing; override those that you need.

    Every rank has its own object, and its hooks are called in the same order on every rank, so
    they may communicate (`torch.distributed`); only `on_log` is called on the main process alone.
    An exception ends the training, after the log has named the callback.

    The hooks get the state of the run, see `RunState` for its attributes. A public method called
    before_, after_ or on_ something, or almost as a hook is, must be a hook: another one would
    never be called, so the class is refused, as is one whose hook takes other arguments.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        hooks = [name for name in vars(Callback) if not name.startswith("_")]
        for name in vars(cls):
            near = did_you_mean(name, hooks, cutoff=0.85)
            if not name.startswith("_") and name not in hooks and (near or _HOOK.match(name)):
                raise UserError(
                    f"{cls.__name__}.{name} is no hook of Callback{near or ': ' + ', '.join(hooks)}"
                    "; give a method of your own another name, or one with an underscore"
                )
            if name in hooks:
                _check_signature(cls, name)
        saves, loads = (
            getattr(cls, name) is not getattr(Callback, name)
            for name in ("state_dict", "load_state_dict")
        )
        if saves != loads:
            raise UserError(f"{cls.__name__} needs both state_dict and load_state_dict, or neither")

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
            result: see `StepResult`: losses, gradient norm and diagnostics, on the device;
                `result.outcome` is `Outcome.APPLIED` if weights changed.
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
        """Return what a resumed run needs, of types that a checkpoint can hold.

        These are tensors, numbers, strings, None, and lists, tuples and dicts of them, with strings
        or numbers as keys. Others, such as sets, NumPy arrays and objects, are an error when the
        checkpoint is written.

        It is called on every rank and may communicate; what the main process returns is saved.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`: before `on_train_start`, and after a rollback."""


def _check_signature(cls: type[Callback], hook: str) -> None:
    """Refuse a hook that does not take what it will be called with."""
    parameters = inspect.signature(getattr(Callback, hook)).parameters.values()
    named = {each.name: None for each in parameters if each.kind is each.KEYWORD_ONLY}
    given = [each.name for each in parameters if each.name not in named]
    try:
        inspect.signature(vars(cls)[hook]).bind(*given, **named)
    except TypeError as error:
        call = ", ".join([*given, *(f"*, {name}" for name in named)])
        raise UserError(f"{cls.__name__}.{hook} must take ({call}): {error}") from error


class Callbacks:
    """Several callbacks, whose errors name the callback in the log.

    Args:
        callbacks: by name, in the order of their calls.
    """

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self._callbacks = dict(callbacks)
        self._started: list[str] = []

    def each(self, hook: Callable[[Callback], T]) -> dict[str, T]:
        """Call a hook of every callback; return what each returned, by name."""
        return {name: self._call(name, hook) for name in self._callbacks}

    def start(self, state: RunState) -> None:
        """Start them."""
        for name in self._callbacks:
            self._started.append(name)
            self._call(name, lambda callback: callback.on_train_start(state))

    def end(self, state: RunState, *, failed: bool) -> None:
        """End the callbacks that were started, also if one of them fails at that."""
        with ExitStack() as stack:
            for name in reversed(self._started):
                stack.callback(
                    self._call, name, lambda callback: callback.on_train_end(state, failed=failed)
                )

    def models(self) -> dict[str, nn.Module]:
        """Return the models of all of them by name."""
        found = self.each(lambda callback: callback.models())
        return {name: model for models in found.values() for name, model in models.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the states of those callbacks that have one, by name."""
        states = self.each(lambda callback: callback.state_dict())
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; states of callbacks that are no longer there are dropped."""
        for name in filter(state.__contains__, self._callbacks):
            own = state[name]
            self._call(name, lambda callback: callback.load_state_dict(own))  # noqa: B023

    def _call(self, name: str, hook: Callable[[Callback], T]) -> T:
        callback = self._callbacks[name]
        try:
            return hook(callback)
        except Exception:
            logger.error("callback %s (%s) failed", name, type(callback).__name__)
            raise


class ExponentialMovingAverage(Callback):
    """Keeps a copy of the model that follows its weights and running statistics.

    Every step that changed weights moves each number of the copy by 1 - decay of its distance to
    the model's. All ranks have the same copy. It is evaluated beside the model and saved.

    Args:
        decay: in (0, 1); 0.9997 averages over about 3300 steps.
        name: of the copy, see `Callback.models`.
    """

    def __init__(self, decay: float = 0.9997, name: str = "ema") -> None:
        self._decay = decay
        self._name = name

    def setup(self, state: RunState) -> None:
        """Begin with the weights of the model."""
        average = get_ema_multi_avg_fn(self._decay)
        self._average = AveragedModel(state.model, multi_avg_fn=average, use_buffers=True)
        self._average.requires_grad_(False)
        self._average.n_averaged.fill_(1)  # the first weights count; 0 would drop them

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Follow the weights, if the step changed them."""
        if result.outcome is Outcome.APPLIED:
            self._average.update_parameters(state.model)

    def models(self) -> Mapping[str, nn.Module]:
        """Return the copy."""
        return {self._name: self._average.module}


class DenoisingMetrics(Callback):
    """Adds `denoising_accuracy`, `loss_matching` and `loss_denoising` to the log records.

    The accuracy is the share of noised boxes whose class was reconstructed, in [0, 1]. The losses
    are the sums of the denoising terms and of all others; they are there if the model has both.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[str, ...], Tensor | None] = {}  # names of terms -> (2, terms)

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Add the numbers of a step."""
        for found in result.diagnostics:
            state.metrics.add("denoising_accuracy", found.denoising_correct, found.denoising_total)
        if result.names not in self._masks:
            is_denoising = [_DENOISING_TERM.search(name) is not None for name in result.names]
            rows = torch.tensor([is_denoising, [not this for this in is_denoising]])
            has_both = bool(rows.any(dim=1).all())
            self._masks[result.names] = rows.to(result.losses) if has_both else None
        mask = self._masks[result.names]
        if mask is not None and result.outcome is not Outcome.NONFINITE:
            state.metrics.add(("loss_denoising", "loss_matching"), mask @ result.losses)


class SkippedFiles(Callback):
    """Counts `skipped_images` and lists at the end of an epoch the files that were skipped in it.

    With `dataloader.train.on_error=skip` a loader replaces an image that cannot be read.
    """

    def __init__(self) -> None:
        self._files: Counter[str] = Counter()  # of this epoch and rank
        self._is_new = True

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Count the files of a batch; exchange and report them at the end of an epoch."""
        self._is_new = False
        skipped = count_skipped(samples)
        state.metrics.count("skipped_images", skipped.total())
        self._files.update(skipped)
        epoch, position = divmod(state.batches_drawn, state.timetable.iterations_per_epoch)
        if position == 0:
            on_all_ranks = sum(all_gather(self._files), Counter())
            if is_main() and on_all_ranks:
                logger.warning("epoch %d: %s", epoch, describe_skipped(on_all_ranks))
            self._files.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the files of all ranks; a collective call."""
        return {"files": dict(sum(all_gather(self._files), Counter()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a resumed run; a rollback takes nothing back that was skipped."""
        if self._is_new and is_main():  # a sum over ranks, so one has it
            self._files = Counter(state["files"])


class Progress(Callback):
    """A progress bar if standard output is a terminal, and a line in the log per log record."""

    def on_train_start(self, state: RunState) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=state.timetable.max_iter,
            initial=state.iteration,
            desc="training",
            file=sys.stdout,
            dynamic_ncols=True,
            disable=not (is_main() and sys.stdout.isatty()),
        )

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Move the bar, back if a rollback came between."""
        self._bar.update(state.iteration - self._bar.n)

    def on_log(self, state: RunState, record: Record) -> None:
        """Show the means of a log record; evaluations report their results themselves."""
        if "loss" not in record:
            return
        number = {k: float("nan") if value is None else value for k, value in record.items()}
        rate = max(value for name, value in number.items() if name.startswith("lr/"))
        summary = f"loss {number['loss']:.4f}, lr {rate:.1e}, data {number['data_time']:.3f} s"
        self._bar.set_postfix_str(summary)
        left = (state.timetable.max_iter - state.iteration) * number["iter_time"]
        logger.info(
            "iteration %d/%d  epoch %.2f  loss %.4f  grad norm %.3g  lr %.1e  data %.3f s  "
            "step %.3f s  %.1f images/s  memory %.0f MiB  eta %s",
            state.iteration, state.timetable.max_iter, number["epoch"], number["loss"],
            number["grad_norm"], rate, number["data_time"], number["iter_time"],
            number["images_per_s"], number["memory_mib"],
            datetime.timedelta(seconds=round(left)),
            extra=FILE_ONLY,
        )  # fmt: skip

    def on_train_end(self, state: RunState, *, failed: bool) -> None:
        """Close the bar."""
        self._bar.close()
