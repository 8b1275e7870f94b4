"""Find the loss term, module and image behind a NaN or an infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from dn_detr.distributed import all_gather
from dn_detr.errors import UserError, image_name

from .memory import Sample

_REMEDIES = (
    "what helps: correct the annotations of images that are marked, or a loss term of yours "
    "(division, log or sqrt at 0); a lower optimizer.lr or train.clip_grad.max_norm; bfloat16 for "
    "float16; train.nonfinite=skip or rollback"
)

Compute = Callable[[Sequence[Sample]], Mapping[str, Tensor]]


class NonFiniteError(UserError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names iteration, terms and images."""


class RunningStatistics:
    """Running statistics of batch normalisation from before a step, which a NaN would stay in.

    Args:
        model: with or without trainable batch normalisation.
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
    micro_batches: Sequence[Sequence[Sample]],
    losses: Mapping[str, float],
    grad_norm: float,
    iteration: int,
) -> str:
    """Return which loss terms, module and images of all ranks are not finite.

    A collective call. The forward pass is computed again, for the batch and for each image alone.

    Args:
        model: not wrapped by DistributedDataParallel, in training mode.
        compute: returns the loss terms of some samples without collective calls.
        micro_batches: this rank's samples, as they were computed.
        losses: terms of this rank.
        grad_norm: of the whole gradient.
        iteration: number of the step, for the message.
    """
    nonfinite_terms = [name for name, value in losses.items() if not math.isfinite(value)]
    samples = [sample for micro_batch in micro_batches for sample in micro_batch]
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        # Its passes are collective calls, and other ranks may have nothing to compute again.
        module = "unknown (batch normalisation is synchronised)"
        images = [f"image {image_name(sample)}" for sample in samples]
    else:
        statistics = RunningStatistics(model)
        module = first_nonfinite_module(model, compute, micro_batches)
        images = _mark_nonfinite_images(compute, samples)
        statistics.restore()
    reports = all_gather((dict(losses), nonfinite_terms, module, images))
    terms = sorted({name for _, names, _, _ in reports for name in names})
    what = f"loss terms {', '.join(terms)}" if terms else "the gradient"
    lines = [f"iteration {iteration}: {what} not finite (gradient norm {grad_norm:.4g})"]
    for rank, (values, _, where, names) in enumerate(reports):
        lines.append(f"rank {rank}:" if len(reports) > 1 else "this batch:")
        lines.append(f"  first module whose numbers are not finite: {where}")
        lines += [f"  {name} = {value:.6g}" for name, value in values.items()]
        lines += [f"  {name}" for name in names]
    return "\n".join([*lines, _REMEDIES])


def first_nonfinite_module(
    model: nn.Module, compute: Compute, micro_batches: Sequence[Sequence[Sample]]
) -> str:
    """Compute a step again and return where it first went wrong.

    Args:
        model: in training mode; its gradients are left alone.
        compute: returns the loss terms of some samples.
        micro_batches: of a batch, one after the other.

    Returns:
        The first weight or buffer that is not finite; else the innermost module whose output is the
        first that is not finite; else the innermost module in whose backward pass a finite gradient
        became another. "none, when computed again" if all is finite (another draw of dropout, for
        instance).
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if not value.isfinite().all():
            return f"{name} (a number of the model)"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for micro_batch in micro_batches:
        watch = _Watch(model)
        with watch, torch.enable_grad():
            losses = compute(micro_batch)
            if watch.nonfinite_outputs:
                return watch.nonfinite_outputs[0]
            total = torch.stack([value.float() for value in losses.values()]).sum()
            if not torch.isfinite(total):
                return "none; the losses, computed from finite outputs"
            watch.attribute(total, "the losses")
            torch.autograd.grad(total, parameters, allow_unused=True)
        if watch.nonfinite_gradients:
            return f"{watch.nonfinite_gradients[0]} (its gradient)"
    return "none, when computed again"


class _Watch:
    """Follows the outputs of modules forward, and gradients backward, in a context.

    Attributes:
        nonfinite_outputs: modules with an output that is not finite, in the order of their return.
        nonfinite_gradients: modules that an operation of the backward pass belongs to whose result
            is not finite though the gradient that it got is, in the order of the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.nonfinite_outputs: list[str] = []
        self.nonfinite_gradients: list[str] = []
        self._model = model
        self._open = ["the model itself"]  # modules in progress, the innermost last
        self._seen: set[Node] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Watch:
        for name, module in self._model.named_modules():
            if module is not self._model:
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(leave))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, inputs: Any, named_inputs: Any) -> None:
        self.attribute((inputs, named_inputs), self._open[-1])
        self._open.append(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._open.pop()
        self.attribute(output, name)
        floats = [v for v in tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
        if not _all_finite(floats):
            self.nonfinite_outputs.append(name)

    def attribute(self, values: Any, name: str) -> None:
        """Watch the operations that made some tensors and belong to no other module yet."""
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        nodes = [tensor.grad_fn for tensor in tensors]
        while nodes:
            node = nodes.pop()
            if node is None or node in self._seen:
                continue
            self._seen.add(node)
            nodes += [previous for previous, _ in node.next_functions]

            def check(after: Any, before: Any, name: str = name) -> None:
                if _all_finite(before) and not _all_finite(after):
                    self.nonfinite_gradients.append(name)

            self._handles.append(node.register_hook(check))


def _all_finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def _mark_nonfinite_images(compute: Compute, samples: Sequence[Sample]) -> list[str]:
    """Return a line for each image, which marks those whose losses are not finite alone."""
    with torch.no_grad():
        is_nonfinite = [not _all_finite(list(compute([sample]).values())) for sample in samples]
    names = [f"image {image_name(sample)}" for sample in samples]
    if all(is_nonfinite) and len(samples) > 1:
        return [*names, "none of them is finite alone: the cause is named above, and no image"]
    return [
        f"{name}  <- not finite alone either" if is_marked else name
        for name, is_marked in zip(names, is_nonfinite, strict=True)
    ]
