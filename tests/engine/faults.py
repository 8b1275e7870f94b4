"""Faults in the numbers of any detector, made by images: they come again when computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADDRESSABLE = 2**47  # bytes; the allocator fails for real
Spoil = Callable[[Tensor], Tensor]


def _infinite_slope(value: Tensor) -> Tensor:
    return value + (value * 0).abs().sqrt()


class _HungryBackward(torch.autograd.Function):
    """The identity, whose backward pass wants more memory than a machine can address."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.empty(ADDRESSABLE, dtype=torch.uint8).sum()


FAULTS: dict[str, Spoil] = {
    "nan_loss": lambda loss: loss * torch.nan,
    "inf_loss": lambda loss: loss * torch.inf,
    "huge_loss": lambda loss: loss * 1e30,
    "nan_gradient_of_loss": _infinite_slope,
    "nan_output": lambda output: output.masked_fill(torch.ones_like(output) > 0, torch.nan),
    "nan_gradient": _infinite_slope,
    "hungry_forward": lambda value: value + torch.empty(ADDRESSABLE, dtype=torch.uint8).sum(),
    "hungry_backward": lambda value: _HungryBackward.apply(value),
}


def faulty(model: nn.Module, kind: str, bad_images: Sequence[int], inside: str = "") -> nn.Module:
    """Return a detector that goes wrong on some images in training.

    Args:
        model: a detector.
        kind: one of `FAULTS`.
        bad_images: `image_id` of those.
        inside: the submodule whose output is spoilt; "" for the last loss term.
    """
    bad, spoil = set(bad_images), FAULTS[kind]
    is_bad = False

    def look(module: nn.Module, inputs: Any) -> None:
        nonlocal is_bad
        is_bad = module.training and any(sample["image_id"] in bad for sample in inputs[0])

    def spoil_output(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not is_bad:
            return None
        if isinstance(output, dict):
            return {**output, list(output)[-1]: spoil(list(output.values())[-1])}
        return spoil(output)

    model.register_forward_pre_hook(look)
    model.get_submodule(inside).register_forward_hook(spoil_output)
    return model
