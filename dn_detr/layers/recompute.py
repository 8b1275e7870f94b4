"""Activation checkpointing: forget what is between the parts of a stack, and compute it again.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016
(https://arxiv.org/abs/1604.06174). The gradients are those without it, bit for bit: each part runs
a second time in the backward pass on the same inputs, random numbers and statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")


def run_part(stack: nn.Module, part: Callable[..., Output], *inputs: Any) -> Output:
    """``part(*inputs)``, without keeping its activations if the stack asks for that.

    Args:
        stack: owner of all modules that ``part`` uses; in training, while its attribute
            ``recompute_activations`` is True, the backward pass runs ``part`` once more.
        part: a module or a method; what it depends on, beside parameters, are its inputs.
        inputs: tensors, or anything else; the part must leave them as they are.

    Raises:
        ValueError: the part is to be run again, but has changed an input in place.
    """
    if not (stack.recompute_activations and stack.training and torch.is_grad_enabled()):
        return part(*inputs)
    versions = [x._version for x in inputs if isinstance(x, Tensor)]
    output: Output = checkpoint(
        part, *inputs, use_reentrant=False, context_fn=lambda: _contexts(stack)
    )
    if [x._version for x in inputs if isinstance(x, Tensor)] != versions:
        raise ValueError(
            f"a part of {type(stack).__name__} changes its input in place, so it cannot be "
            "computed again; switch activation checkpointing off for it"
        )
    return output


def choose_recomputation(name: str, stack: Any, chosen: bool) -> None:
    """Switch the recomputation of a stack on or off.

    Raises:
        ValueError: ``chosen``, but the stack cannot.
    """
    if hasattr(stack, "recompute_activations"):
        stack.recompute_activations = chosen
    elif chosen:
        raise ValueError(
            f"the {name} {type(stack).__name__} cannot recompute its activations; leave "
            f"checkpointing off for the {name}, or give the class an attribute "
            "recompute_activations and run its layers with dn_detr.layers.run_part"
        )


def _contexts(
    stack: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward pass, and for the second one."""
    return nullcontext(), _without_new_statistics(stack)


@contextmanager
def _without_new_statistics(stack: nn.Module) -> Iterator[None]:
    """Let batch normalisation count the same images a second time in copies of its statistics."""
    norms = [module for module in stack.modules() if isinstance(module, _BatchNorm)]
    counted = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
    try:
        for norm, buffers in counted:
            for name, value in buffers.items():
                setattr(norm, name, value.clone())
        yield
    finally:
        for norm, buffers in counted:
            for name, value in buffers.items():
                setattr(norm, name, value)
