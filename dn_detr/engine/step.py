"""One optimizer step: forward, backward, clipping, and the policies for a step that fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dn_detr.allocator import release_freed_memory
from dn_detr.distributed import any_process, average_gradients, is_distributed
from dn_detr.errors import UserError
from dn_detr.modeling import ObjectCounts, mean_over_ranks
from dn_detr.protocols import CountsObjects, Diagnostics, HasDiagnostics, Sample

from .memory import OutOfMemory, describe_batch, is_out_of_memory
from .nonfinite import NonFiniteError, RunningStatistics, explain
from .random_state import capture_random_state, preserved_random_state, restore_random_state
from .settings import AmpSettings, ClipGradSettings


class Outcome(Enum):
    """Result of a step; the same on all ranks."""

    APPLIED = "applied"
    OVERFLOW = "overflow"  # of float16, repaired by a smaller loss scale; no weight changed
    NONFINITE = "nonfinite"  # a loss or the gradient; no weight changed
    OUT_OF_MEMORY = "oom"  # on some rank; no weight changed


class StepResult(NamedTuple):
    """Numbers of one step, still on the device.

    Attributes:
        names: loss terms; empty after running out of memory.
        losses: their values, (len(names),) float32.
        grad_norm: global norm of the gradients before clipping, ().
        outcome: whether weights changed, and if not, why.
        stop: whether any rank asked to stop.
        diagnostics: the model's, one per micro-batch; empty if it has none or the step failed.
        report: what went wrong, where something did.
    """

    names: tuple[str, ...]
    losses: Tensor
    grad_norm: Tensor
    outcome: Outcome = Outcome.APPLIED
    stop: bool = False
    diagnostics: tuple[Diagnostics, ...] = ()
    report: str = ""


@dataclass(eq=False, repr=False)
class TrainingStep:
    """Turns a batch into an updated model.

    Args:
        model: see `dn_detr.protocols.Model`; may be wrapped by DistributedDataParallel.
        optimizer: over its parameters.
        device: where the model is.
        amp: mixed precision of the forward pass.
        clip_grad: clipping of the global gradient norm.
        accumulate: number of micro-batches in which the batch is computed, >= 1.
        survive_out_of_memory: end a step that does not fit into memory without an exception.
        survive_nonfinite: the same for a loss or gradient that is not finite.

    Raises:
        ValueError: surviving out of memory with batch normalisation that is synchronised over
            ranks, which would wait for the one that ran out.
    """

    model: nn.Module
    optimizer: Optimizer
    _: KW_ONLY
    device: torch.device
    amp: AmpSettings
    clip_grad: ClipGradSettings
    accumulate: int = 1
    survive_out_of_memory: bool = False
    survive_nonfinite: bool = False

    def __post_init__(self) -> None:
        model, device, amp = self.model, self.device.type, self.amp
        is_scaled = amp.enabled and amp.dtype == "float16"
        self.scaler = torch.amp.GradScaler(device, enabled=is_scaled)
        dtype = getattr(torch, amp.dtype)
        self._autocast = torch.autocast(device, dtype=dtype, enabled=amp.enabled)
        self._module = model.module if isinstance(model, DistributedDataParallel) else model
        # asked once, because asking costs more than calling
        self._counting = self._module if isinstance(self._module, CountsObjects) else None
        self._diagnosing = self._module if isinstance(self._module, HasDiagnostics) else None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # On CPUs as well: DistributedDataParallel adds in another order in the first step after a
        # start than in later ones, so that a resumed run of three processes would not be exact.
        self._averages_itself = is_distributed() and (self.survive_out_of_memory or device == "cpu")
        self._statistics = RunningStatistics(self._module)
        if self._averages_itself and any(
            isinstance(module, nn.SyncBatchNorm) for module in self._module.modules()
        ):
            raise UserError(
                "train.oom=skip does not go with batch normalisation that is synchronised over "
                "processes; use train.oom=raise or freeze it"
            )

    def __call__(
        self, samples: Sequence[Sample], iteration: int, *, wants_stop: bool = False
    ) -> StepResult:
        """Make one optimizer step.

        Args:
            samples: of this rank.
            iteration: number of this step, for messages.
            wants_stop: whether this rank asks all to stop after this step.

        Raises:
            NonFiniteError: on every rank, before the step, if a loss on any of them or the
                gradient is NaN or infinite. (An overflow that float16 scaling caused and repairs
                is none.)
            OutOfMemory: on the rank that ran out of memory.
        """
        self._statistics.remember()
        random_state = capture_random_state()
        micro_batches = split_evenly(samples, self.accumulate)
        counts: ObjectCounts | None = None
        if self._counting is not None:
            objects = sum(map(self._counting.count_objects, micro_batches), ObjectCounts())
            counts = mean_over_ranks(objects, self.device)
        out_of_memory = ""
        try:
            names, terms, diagnostics = self._compute_gradients(micro_batches, counts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not self.survive_out_of_memory:
                raise OutOfMemory(self._memory_report(samples, iteration, str(error))) from error
            out_of_memory = str(error) or type(error).__name__
        if self._averages_itself or out_of_memory:
            ran_out, stop = any_process(bool(out_of_memory), wants_stop, device=self.device)
            if ran_out:
                return self._skip_out_of_memory(samples, iteration, out_of_memory, stop)
            average_gradients(self._parameters)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, self.clip_grad.norm_type)
        if self.clip_grad.max_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad.max_norm, norm)
        outcome, stop = self._outcome_over_ranks(terms.sum(), norm, wants_stop)
        result = StepResult(names, terms, norm, outcome, stop, diagnostics)
        if outcome is Outcome.NONFINITE:
            return self._skip_nonfinite(micro_batches, iteration, result, counts, random_state)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result

    def _compute_gradients(
        self, micro_batches: Sequence[Sequence[Sample]], counts: ObjectCounts | None
    ) -> tuple[tuple[str, ...], Tensor, tuple[Diagnostics, ...]]:
        """Add up the gradients of all micro-batches.

        Returns:
            Names and sums (len(names),) of the loss terms, and the model's diagnostics.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        diagnostics = []
        for index, samples in enumerate(micro_batches):
            # Ranks exchange gradients in the last backward pass, if not after it.
            is_last = index + 1 == len(micro_batches)
            synchronises = is_last and not self._averages_itself
            with (
                self.model.no_sync()
                if isinstance(self.model, DistributedDataParallel) and not synchronises
                else nullcontext()
            ):
                losses = self._losses(self.model, samples, counts)
                if counts is None:  # means over the images of a micro-batch
                    share = len(samples) / sum(map(len, micro_batches))
                    losses = losses if share == 1 else {k: share * x for k, x in losses.items()}
                terms = torch.stack([value.float() for value in losses.values()])
                self.scaler.scale(terms.sum()).backward()
            for name, value in zip(losses, terms.detach(), strict=True):
                sums[name] = sums[name] + value if name in sums else value
            if self._diagnosing is not None and self._diagnosing.diagnostics is not None:
                diagnostics.append(self._diagnosing.diagnostics)
        return tuple(sums), torch.stack(list(sums.values())), tuple(diagnostics)

    def _losses(
        self, model: nn.Module, samples: Sequence[Sample], counts: ObjectCounts | None
    ) -> dict[str, Tensor]:
        with self._autocast:
            losses: dict[str, Tensor] = model(samples) if counts is None else model(samples, counts)
        return losses

    def _outcome_over_ranks(
        self, total: Tensor, norm: Tensor, wants_stop: bool
    ) -> tuple[Outcome, bool]:
        """Decide the same on all ranks, with one small collective."""
        wrong_loss, wrong_gradient, stop = any_process(
            ~total.isfinite(), ~norm.isfinite(), wants_stop, device=self.device
        )
        # A float16 overflow that a smaller loss scale can mend shows in the gradient only.
        if wrong_gradient and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return Outcome.NONFINITE if wrong_loss else Outcome.OVERFLOW, stop
        return (Outcome.NONFINITE if wrong_loss or wrong_gradient else Outcome.APPLIED), stop

    def _skip_nonfinite(
        self,
        micro_batches: Sequence[Sequence[Sample]],
        iteration: int,
        result: StepResult,
        counts: ObjectCounts | None,
        random_state: dict[str, Any],
    ) -> StepResult:
        """Explain a step whose numbers are not finite; undo what it changed, or raise."""
        self.optimizer.zero_grad(set_to_none=True)
        self._statistics.restore()
        losses = dict(zip(result.names, result.losses.tolist(), strict=True))
        with preserved_random_state():
            restore_random_state(random_state)
            report = explain(
                self._module,
                lambda samples: self._losses(self._module, samples, counts),
                micro_batches,
                losses,
                result.grad_norm.item(),
                iteration,
            )
        if not self.survive_nonfinite:
            raise NonFiniteError(f"{report}\nstopped before the optimizer step")
        if self.scaler.is_enabled():  # drop the gradients; the scale is not the cause
            self.scaler.update(self.scaler.get_scale())
        return result._replace(diagnostics=(), report=report)

    def _skip_out_of_memory(
        self, samples: Sequence[Sample], iteration: int, complaint: str, stop: bool
    ) -> StepResult:
        """End a step that did not fit into memory on some rank; `complaint` is "" on others."""
        self.optimizer.zero_grad(set_to_none=True)
        self._statistics.restore()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        release_freed_memory()  # others, such as the writer of checkpoints, need some too
        # Written only now, so that no text lies behind the freed blocks and keeps them.
        if complaint:
            report = self._memory_report(samples, iteration, complaint)
        else:
            report = f"iteration {iteration}: out of memory on another rank"
        nothing = torch.zeros(0, device=self.device)
        return StepResult((), nothing, nothing.sum(), Outcome.OUT_OF_MEMORY, stop, report=report)

    def _memory_report(self, samples: Sequence[Sample], iteration: int, complaint: str) -> str:
        return (
            f"iteration {iteration}: out of memory on {self.device}: {complaint}\n"
            f"{describe_batch(samples)}\n"
            "what helps: train.accumulate=2 or more, train.activation_checkpointing.encoder="
            "true (backbone, decoder), a smaller dataloader.image_scale, "
            "model.denoising.max_queries or dataloader.train.total_batch_size, or "
            "train.oom=skip if only some images are too large"
        )


def split_evenly(batch: Sequence[Sample], count: int) -> list[Sequence[Sample]]:
    """Cut a batch into `count` micro-batches, or one per sample; sizes differ by one at most."""
    count = min(count, len(batch))
    bounds = [len(batch) * index // count for index in range(count + 1)]
    return [batch[start:end] for start, end in itertools.pairwise(bounds)]
