"""Activation checkpointing: recompute activations in the backward pass instead of keeping them.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016
(https://arxiv.org/abs/1604.06174). Losses, gradients and running statistics are those without it,
bit for bit. torch's `checkpoint_wrapper` is not used: it inserts itself into the names of modules
and parameters, and batch normalisation would count every image twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")


def run_checkpointed(owner: nn.Module, step: Callable[..., Output], *inputs: Any) -> Output:
    """Return `step(*inputs)`, with activation checkpointing if the owner is set to it.

    Args:
        owner: contains all modules that `step` uses. While its attribute
            `activation_checkpointing` is True, in training, the backward pass runs `step` again.
        step: a module or a method that depends on parameters and on its inputs only.
        inputs: tensors, or anything else; `step` must not change them.

    Raises:
        ValueError: `step` is checkpointed, but has changed an input in place.
    """
    if not (owner.activation_checkpointing and owner.training and torch.is_grad_enabled()):
        return step(*inputs)
    versions = [x._version for x in inputs if isinstance(x, Tensor)]
    output: Output = checkpoint(
        step,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _without_running_statistics(owner)),
    )
    if [x._version for x in inputs if isinstance(x, Tensor)] != versions:
        raise ValueError(
            f"a step of {type(owner).__name__} changes its input in place, so it cannot be run "
            "again; switch activation checkpointing off for it"
        )
    return output


@contextmanager
def _without_running_statistics(owner: nn.Module) -> Iterator[None]:
    """Let batch normalisation count the same images a second time in copies of its statistics."""
    norms = [module for module in owner.modules() if isinstance(module, _BatchNorm)]
    buffers = [(norm, *item) for norm in norms for item in norm.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)
