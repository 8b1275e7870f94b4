"""The exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dn_detr.protocols import Sample

from .callbacks import Callback
from .step import Outcome, StepResult

if TYPE_CHECKING:
    from .run_state import RunState


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
