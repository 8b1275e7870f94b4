"""Padding kept away from features: what a spatial filter reads of it is zero.

An image in a batch is followed by padding at the bottom and right. Zeros there do not stay zeros:
biases and normalisations fill the padded cells, and the next 3x3 convolution carries them into the
image. So every filter that looks at neighbours has its input's padding set to zero, which is what
the filter's own zero padding shows an image that is alone. The features of an image are then the
same alone and in any batch.

The mask reaches the filters inside a foreign network through hooks. Each knows the stride of its
input from a dry run at construction; the mask itself lives only during the call and only for the
calling thread, so that modules hold no state, and nothing here stands in the way of
`torch.compile`, `torch.export` with dynamic sizes, `copy.deepcopy` or several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

Output = TypeVar("Output")

_current = threading.local()


class KnownPadding:
    """A context in which the hooked filters see the padding of the images.

    Args:
        mask: (B, H, W) bool, True = padding.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._derived: dict[Hashable, Tensor] = {}
        self._outer: list[KnownPadding | None] = []

    def __enter__(self) -> KnownPadding:
        self._outer.append(current_padding())
        _current.padding = self
        return self

    def __exit__(self, *exception: object) -> None:
        _current.padding = self._outer.pop()

    def valid(self, stride: int, height: int, width: int) -> Tensor:
        """The cells of a map that are not padding.

        The map's size is asked for, not computed, so that a traced graph needs no proof that a
        network's arithmetic of sizes and ours agree.

        Args:
            stride: pixels per cell.
            height: ceil(H / stride).
            width: ceil(W / stride).

        Returns:
            (B, height, width) bool.
        """
        rows = torch.arange(height, device=self.mask.device) * stride
        columns = torch.arange(width, device=self.mask.device) * stride
        return ~self.mask[:, rows[:, None], columns]

    def keep(self, stride: int, height: int, width: int, *, dtype: torch.dtype) -> Tensor:
        """`valid` as factors (B, height, width): 0 in the padding, 1 elsewhere."""
        key = (stride, dtype)
        return self.derive(key, lambda: self.valid(stride, height, width).to(dtype))

    def derive(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns, computed once per call of the network."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]


def current_padding() -> KnownPadding | None:
    """The padding of the images that this thread's network is looking at, if it is known."""
    return getattr(_current, "padding", None)


def with_known_padding(part: Callable[[Tensor], Output]) -> Callable[[Tensor], Output]:
    """`part` that sees the padding of now whenever it runs, also in the backward pass."""
    padding = current_padding()

    def run(x: Tensor) -> Output:
        with padding or nullcontext():
            return part(x)

    return run


@dataclass
class DryRun:
    """What a network did with an image of a known size, without computing anything.

    Attributes:
        outputs: the network's maps, on the meta device.
        filters: modules that read neighbouring cells, with the stride of their input.
        used: names of the parameters that the outputs depend on.
    """

    outputs: list[Tensor]
    filters: dict[nn.Module, int]
    used: set[str]


def dry_run(body: nn.Module, height: int, width: int) -> DryRun:
    """Run a network in evaluation mode on the meta device: shapes only, neither memory nor time.

    Args:
        body: (1, 3, height, width) -> maps as a list or dict. It stays where it is, and as it is.
        height: pixels, a multiple of the network's largest stride.
        width: as `height`; another number, so that the two cannot be confused.
    """
    shapes: dict[nn.Module, set[tuple[int, int]]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.setdefault(module, set()).add((inputs[0].shape[-2], inputs[0].shape[-1]))

    handles = [m.register_forward_pre_hook(record) for m in body.modules() if _is_filter(m)]
    parameters = {
        name: torch.empty_like(p, device="meta").requires_grad_()
        for name, p in body.named_parameters()
    }
    buffers = {name: torch.empty_like(b, device="meta") for name, b in body.named_buffers()}
    training = {module: module.training for module in body.modules()}
    try:
        body.eval()
        with torch.enable_grad(), torch.device("meta"):
            images = torch.empty(1, 3, height, width)
            maps = functional_call(body, parameters | buffers, (images,))
            outputs = list(maps.values()) if isinstance(maps, dict) else list(maps)
            torch.stack([output.sum() for output in outputs]).sum().backward()
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for handle in handles:
            handle.remove()
    filters = {
        module: height // h
        for module, sizes in shapes.items()
        for h, w in sizes
        if len(sizes) == 1 and height % h == 0 and width % w == 0 and height // h == width // w
    }
    return DryRun(outputs, filters, {n for n, p in parameters.items() if p.grad is not None})


def _is_filter(module: nn.Module) -> bool:
    """Whether a module mixes neighbouring cells."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size != (1, 1)
    return isinstance(module, (nn.MaxPool2d, nn.AvgPool2d))


def zero_padding_before(modules: Iterable[tuple[nn.Module, int]]) -> None:
    """Hook modules so that they read zeros where a `KnownPadding` says padding.

    Args:
        modules: each takes a map (B, C, h, w) as its only argument; with the map's stride.
    """
    for module, stride in modules:
        module.register_forward_pre_hook(partial(_zero_padding, stride=stride, dim=1))


def zero_padding_before_channels_last(modules: Iterable[tuple[nn.Module, int]]) -> None:
    """As `zero_padding_before`, for modules that take a map (B, h, w, C)."""
    for module, stride in modules:
        module.register_forward_pre_hook(partial(_zero_padding, stride=stride, dim=-1))


def ignore_padding_in_max_pools(modules: Iterable[tuple[nn.MaxPool2d, int]]) -> None:
    """Hook max pools so that padding is never the maximum.

    A pool sees minus infinity beyond the border of an image that is alone, so zeros would not do
    where the map has negative cells. What it returns for windows of padding only, is zero.

    Args:
        modules: each with the stride of its input.
    """
    for module, stride in modules:
        module.register_forward_pre_hook(partial(_lower_padding, stride=stride))
        step = module.stride if isinstance(module.stride, int) else module.stride[0]
        module.register_forward_hook(partial(_zero_pooled_padding, stride=stride * step))


def _zero_padding(
    module: nn.Module, inputs: tuple[Tensor], *, stride: int, dim: int
) -> tuple[Tensor] | None:
    padding = current_padding()
    if padding is None:
        return None
    (x,) = inputs
    height, width = x.shape[-2:] if dim == 1 else x.shape[1:3]
    keep = padding.keep(stride, height, width, dtype=x.dtype)
    return (x * keep.unsqueeze(dim),)


def _lower_padding(
    module: nn.Module, inputs: tuple[Tensor], *, stride: int
) -> tuple[Tensor] | None:
    padding = current_padding()
    if padding is None:
        return None
    (x,) = inputs
    return (x.masked_fill(~padding.valid(stride, *x.shape[-2:])[:, None], -torch.inf),)


def _zero_pooled_padding(
    module: nn.Module, inputs: tuple[Tensor], output: Tensor, *, stride: int
) -> Tensor | None:
    padding = current_padding()
    if padding is None:
        return None
    return output.masked_fill(~padding.valid(stride, *output.shape[-2:])[:, None], 0.0)
