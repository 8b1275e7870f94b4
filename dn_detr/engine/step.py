"""One optimizer step: forward, backward, clipping, and the guard against numbers gone wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import all_gather, is_distributed
from .errors import NonFiniteError
from .settings import AmpSettings, ClipGradSettings

Sample = Mapping[str, Any]


class StepResult(NamedTuple):
    """Numbers of one step, still on the device.

    Attributes:
        names: loss terms.
        losses: their values, (len(names),) float32.
        grad_norm: global norm of the gradients before clipping, ().
    """

    names: tuple[str, ...]
    losses: Tensor
    grad_norm: Tensor


class TrainingStep:
    """Turns a batch into an updated model.

    Args:
        model: in training mode returns a dict of weighted scalar losses; may be wrapped by
            DistributedDataParallel.
        optimizer: over its parameters.
        device: where the model is.
        amp: mixed precision of the forward pass.
        clip_grad: clipping of the global gradient norm.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        device: torch.device,
        amp: AmpSettings,
        clip_grad: ClipGradSettings,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=amp.enabled and amp.dtype == "float16"
        )
        self._autocast = torch.autocast(
            device.type, dtype=getattr(torch, amp.dtype), enabled=amp.enabled
        )
        self._clip_grad = clip_grad

    def __call__(self, batch: Sequence[Sample], iteration: int) -> StepResult:
        """Make one optimizer step.

        Args:
            batch: this process's samples.
            iteration: number of this step, for messages.

        Raises:
            NonFiniteError: on every process, before the step, if a loss on any of them or the
                gradient is NaN or infinite. (An overflow that float16 scaling caused and repairs
                is none.)
        """
        with self._autocast:
            losses = self.model(batch)
        names = tuple(losses)
        terms = torch.stack([losses[name].float() for name in names])
        total = terms.sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        result = StepResult(names, terms.detach(), self._clip())
        if self._went_wrong(total.detach(), result.grad_norm):
            raise NonFiniteError(_report(batch, iteration, result))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result

    def _clip(self) -> Tensor:
        """Clip the gradients in place; return their global norm before that."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, self._clip_grad.norm_type)
        if self._clip_grad.max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_grad.max_norm, norm)
        return norm

    def _went_wrong(self, total: Tensor, grad_norm: Tensor) -> bool:
        """Decide the same on all processes, with one small collective and one copy to the host."""
        wrong = ~torch.isfinite(total)
        # A float16 overflow that a smaller loss scale can mend shows in the gradient only.
        if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            wrong |= ~torch.isfinite(grad_norm)
        count = wrong.float()
        if is_distributed():
            dist.all_reduce(count)
        return bool(count.item())


def _report(batch: Sequence[Sample], iteration: int, result: StepResult) -> str:
    """Return loss terms and images of every process; a collective call."""
    values = dict(zip(result.names, result.losses.tolist(), strict=True))
    images = [str(sample.get("file_name", sample.get("image_id", "?"))) for sample in batch]
    reports = all_gather((values, images))
    culprits = {name for terms, _ in reports for name, x in terms.items() if not math.isfinite(x)}
    what = f"loss terms {', '.join(sorted(culprits))}" if culprits else "the gradient"
    lines = [
        f"iteration {iteration}: {what} not finite (gradient norm {result.grad_norm.item():.4g}); "
        "stopped before the optimizer step"
    ]
    for process, (terms, files) in enumerate(reports):
        lines += [f"rank {process}:" if len(reports) > 1 else "this batch:"]
        lines += [f"  {name} = {value:.6g}" for name, value in terms.items()]
        lines += [f"  image {file}" for file in files]
    return "\n".join(lines)
