"""Numbers gone wrong: which loss term, which module and which images made a NaN or an infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from dn_detr.distributed import all_gather
from dn_detr.errors import UserError, image_name

from .memory import Sample

_REMEDIES = (
    "what helps: correct the annotations of images that are marked; a lower optimizer.lr or "
    "train.clip_grad.max_norm; bfloat16 for float16; train.nonfinite=skip or rollback"
)

Compute = Callable[[Sequence[Sample]], Mapping[str, Tensor]]


class NonFiniteError(UserError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names iteration, terms and images."""


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
    pieces: Sequence[Sequence[Sample]],
    losses: Mapping[str, float],
    grad_norm: float,
    iteration: int,
) -> str:
    """Return which loss terms, module and images of all processes are not finite.

    A collective call. The forward pass is computed again, for the batch and for each image alone.

    Args:
        model: not wrapped by DistributedDataParallel, in training mode.
        compute: returns the loss terms of some samples without talking to other processes.
        pieces: this process's samples, as they were computed.
        losses: terms of this process.
        grad_norm: of the whole gradient.
        iteration: number of the step, for the message.
    """
    culprits = [name for name, value in losses.items() if not math.isfinite(value)]
    samples = [sample for piece in pieces for sample in piece]
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        # Its passes talk to the other processes, which may have found their culprit earlier.
        module = "unknown (batch normalisation is synchronised)"
        images = [f"image {image_name(sample)}" for sample in samples]
    else:
        statistics = RunningStatistics(model)
        module = first_nonfinite_module(model, compute, pieces)
        images = _judged(compute, samples)
        statistics.restore()
    reports = all_gather((dict(losses), culprits, module, images))
    terms = sorted({name for _, names, _, _ in reports for name in names})
    what = f"loss terms {', '.join(terms)}" if terms else "the gradient"
    lines = [f"iteration {iteration}: {what} not finite (gradient norm {grad_norm:.4g})"]
    for process, (values, _, where, names) in enumerate(reports):
        lines.append(f"rank {process}:" if len(reports) > 1 else "this batch:")
        lines.append(f"  first module whose numbers are not finite: {where}")
        lines += [f"  {name} = {value:.6g}" for name, value in values.items()]
        lines += [f"  {name}" for name in names]
    return "\n".join([*lines, _REMEDIES])


def first_nonfinite_module(
    model: nn.Module, compute: Compute, pieces: Sequence[Sequence[Sample]]
) -> str:
    """Compute a step again and return where it first went wrong.

    Args:
        model: in training mode; its gradients are left alone.
        compute: returns the loss terms of some samples.
        pieces: of a batch, one after the other.

    Returns:
        The first weight or buffer that is not finite; else the innermost module whose output is the
        first that is not finite; else the module in whose backward pass the gradient broke, or the
        last one before if that lies between modules. "none, when computed again" if all is finite
        (another draw of dropout, for instance).
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if not value.isfinite().all():
            return f"{name} (a number of the model)"
    for piece in pieces:
        if found := _first_in_piece(model, compute, piece):
            return found
    return "none, when computed again"


def _first_in_piece(model: nn.Module, compute: Compute, piece: Sequence[Sample]) -> str:
    watch = _Watch()
    with watch.over(model), torch.enable_grad():
        losses = compute(piece)
        if watch.wrong_outputs:
            return watch.wrong_outputs[0]
        total = torch.stack([value.float() for value in losses.values()]).sum()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    if not torch.isfinite(total):
        return "none; the losses, computed from finite outputs"
    if culprit := watch.where_the_gradient_broke():
        return culprit
    wrong = [
        name
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    return f"{wrong[0]} (its gradient)" if wrong else ""


@dataclass
class _Call:
    """One call of a module; what is known of the gradients of its outputs."""

    name: str
    has_gradient: bool = False
    has_wrong_gradient: bool = False


@dataclass
class _Watch:
    """Follows outputs through the forward pass and gradients through the backward pass.

    Attributes:
        wrong_outputs: modules with an output that is not finite, in the order of their return.
        wrong_output_gradients: modules that got a gradient that is not finite, in order.
        wrong_input_gradients: calls that passed on a gradient that is not finite, in order.
    """

    wrong_outputs: list[str] = field(default_factory=list)
    wrong_output_gradients: list[str] = field(default_factory=list)
    wrong_input_gradients: list[_Call] = field(default_factory=list)
    _open: dict[str, _Call] = field(default_factory=dict)

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch every module inside a model."""
        handles = []
        for name, module in model.named_modules():
            if module is not model:
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def where_the_gradient_broke(self) -> str:
        """Return the innermost module that turned finite gradients into others; "" if none did."""
        culprit = ""
        for call in self.wrong_input_gradients:
            is_culprit = call.has_gradient and not call.has_wrong_gradient
            if is_culprit and (not culprit or call.name.startswith(f"{culprit}.")):
                culprit = call.name
        if culprit:
            return f"{culprit} (its gradient)"
        if self.wrong_output_gradients:
            return f"{self.wrong_output_gradients[0]} (the gradient of its output)"
        return ""

    def _enter(self, name: str, module: nn.Module, inputs: Any, named_inputs: Any) -> Any:
        call = self._open[name] = _Call(name)

        def note_gradient(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                self.wrong_input_gradients.append(call)

        def of_its_own(value: Any) -> Any:
            """A view, whose gradient is what this module alone, of all that read it, passes on."""
            if not _is_float(value) or not value.requires_grad:
                return value
            view = value.view_as(value)
            view.register_hook(note_gradient)
            return view

        return tree_map(of_its_own, (inputs, named_inputs))

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        call = self._open.pop(name)

        def note_gradient(gradient: Tensor) -> None:
            call.has_gradient = True
            if not gradient.isfinite().all():
                call.has_wrong_gradient = True
                self.wrong_output_gradients.append(name)

        for value in filter(_is_float, tree_leaves(output)):
            if not value.isfinite().all():
                self.wrong_outputs.append(name)
            if value.requires_grad:
                value.register_hook(note_gradient)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _judged(compute: Compute, samples: Sequence[Sample]) -> list[str]:
    """Return a line for each image, marking those that are not finite alone."""
    with torch.no_grad():
        guilty = [not _is_finite(compute([sample])) for sample in samples]
    names = [f"image {image_name(sample)}" for sample in samples]
    if all(guilty) and len(samples) > 1:
        return [*names, "none of them is finite alone: the weights are to blame, not the images"]
    return [
        f"{name}  <- not finite alone either" if is_guilty else name
        for name, is_guilty in zip(names, guilty, strict=True)
    ]


def _is_finite(losses: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite()) for value in losses.values())
