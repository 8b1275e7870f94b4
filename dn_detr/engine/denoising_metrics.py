"""What log records say about the denoising queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dn_detr.protocols import Sample

from .callbacks import Callback
from .step import Outcome, StepResult

if TYPE_CHECKING:
    from .run_state import RunState

_DENOISING_TERM = re.compile(r"_dn(_\d+)?$")  # loss_ce_dn, loss_ce_dn_0


class DenoisingMetrics(Callback):
    """Adds `denoising_accuracy`, `loss_matching` and `loss_denoising` to the log records.

    The accuracy is the share of noised boxes whose class was reconstructed, in [0, 1]. The losses
    are the sums of the denoising terms and of all others; they are there if the model has both.
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[str, ...], Tensor] = {}  # names of terms -> which are denoising

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Add the numbers of a step."""
        for found in result.diagnostics:
            state.metrics.add("denoising_accuracy", found.denoising_correct, found.denoising_total)
        is_denoising = [_DENOISING_TERM.search(name) is not None for name in result.names]
        if result.outcome is Outcome.NONFINITE or len(set(is_denoising)) < 2:
            return
        if result.names not in self._masks:
            self._masks[result.names] = torch.tensor(is_denoising, device=result.losses.device)
        mask = self._masks[result.names]
        state.metrics.add("loss_denoising", result.losses.masked_fill(~mask, 0).sum())
        state.metrics.add("loss_matching", result.losses.masked_fill(mask, 0).sum())
