"""Numbers gone wrong: which loss term, which module and which images made a NaN or an infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from .distributed import all_gather
from .memory import image_name
from .random_state import preserved_random_state

Sample = Mapping[str, Any]
Compute = Callable[[Sequence[Sample]], Mapping[str, Tensor]]


class RunningStatistics:
    """Keeps the running statistics of batch normalisation from before a step.

    A forward pass changes them, and one NaN in them would stay for ever.

    Args:
        model: its trainable batch normalisation layers are looked after.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def remember(self) -> None:
        """Keep the present statistics."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore(self) -> None:
        """Put back what was kept."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)


def explain(
    model: nn.Module,
    compute: Compute,
    batch: Sequence[Sample],
    losses: Mapping[str, float],
    grad_norm: float,
    iteration: int,
) -> str:
    """Return which loss terms, module and images of all processes are not finite.

    A collective call. The forward pass is computed again, for the batch and for each image alone.

    Args:
        model: not wrapped by DistributedDataParallel, in training mode.
        compute: returns the loss terms of some samples without talking to other processes.
        batch: this process's samples.
        losses: terms of this process.
        grad_norm: of the whole gradient.
        iteration: number of the step, for the message.
    """
    culprits = [name for name, value in losses.items() if not math.isfinite(value)]
    statistics = RunningStatistics(model)
    with preserved_random_state():
        module = first_nonfinite_module(model, compute, batch)
        images = [image_name(sample) + _verdict(model, compute, sample) for sample in batch]
    statistics.restore()
    reports = all_gather((dict(losses), culprits, module, images))
    terms = sorted({name for _, names, _, _ in reports for name in names})
    what = f"loss terms {', '.join(terms)}" if terms else "the gradient"
    lines = [f"iteration {iteration}: {what} not finite (gradient norm {grad_norm:.4g})"]
    for process, (values, _, where, names) in enumerate(reports):
        lines.append(f"rank {process}:" if len(reports) > 1 else "this batch:")
        lines.append(f"  first module whose numbers are not finite: {where}")
        lines += [f"  {name} = {value:.6g}" for name, value in values.items()]
        lines += [f"  image {name}" for name in names]
    return "\n".join(lines)


def first_nonfinite_module(model: nn.Module, compute: Compute, batch: Sequence[Sample]) -> str:
    """Compute a step again and return where it first went wrong.

    Args:
        model: in training mode; its gradients are left alone.
        compute: returns the loss terms of the samples.
        batch: samples.

    Returns:
        The name of the innermost module whose output, or else of the one at whose output the
        gradient, is the first that is not finite; "none, when computed again" if all is finite
        (another draw of dropout, for instance).
    """
    forward: list[str] = []
    backward: list[str] = []
    with _watched(model, forward, backward), torch.enable_grad():
        losses = compute(batch)
        if forward:
            return forward[0]
        total = torch.stack([value.float() for value in losses.values()]).sum()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    if not torch.isfinite(total):
        return "none; the losses, computed from finite outputs"
    wrong = [
        name
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    first = next(iter(backward + wrong), None)
    return f"{first} (its gradient)" if first else "none, when computed again"


@contextmanager
def _watched(model: nn.Module, forward: list[str], backward: list[str]) -> Iterator[None]:
    """Note, in order, modules whose outputs and whose outputs' gradients are not finite."""

    def watch(name: str) -> Any:
        def note_gradient(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                backward.append(name)

        def note_output(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    if not value.isfinite().all():
                        forward.append(name)
                    if value.requires_grad:
                        value.register_hook(note_gradient)

        return note_output

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if module is not model
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _verdict(model: nn.Module, compute: Compute, sample: Sample) -> str:
    """Say whether an image alone is not finite either."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return ""  # its forward pass talks to the other processes, which have other images
    with torch.no_grad():
        losses = compute([sample])
    is_finite = all(bool(value.isfinite()) for value in losses.values())
    return "" if is_finite else "  <- not finite alone either"
