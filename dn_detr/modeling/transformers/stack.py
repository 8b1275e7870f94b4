"""Stacks of equal layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn


def make_layers(
    layer: Callable[..., nn.Module], num_layers: int, **first_layer: object
) -> nn.ModuleList:
    """Make the layers of an encoder or decoder.

    Args:
        layer: makes a layer; in a config `L(MyLayer)(_partial_=True, ...)`.
        num_layers: how many.
        **first_layer: further arguments of the first layer.

    Raises:
        ValueError: fewer than one layer, or `layer` is a layer itself.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers {num_layers} must be at least 1")
    if isinstance(layer, nn.Module):
        raise ValueError(
            f"layer is one {type(layer).__name__} for all layers; it must be a function that makes "
            "them: set _partial_=True in its node of the config"
        )
    # A module among the arguments is copied with them, so that layers do not share it.
    return nn.ModuleList(
        copy.deepcopy(layer)(**(first_layer if index == 0 else {})) for index in range(num_layers)
    )
