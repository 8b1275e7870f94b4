"""`LazyCall`: write a call in a config now, make it later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from .nodes import to_node
from .targets import dotted_name


class LazyCall:
    """Record a call as a config node instead of making it; imported as `L`.

    `L(Linear)(in_features=4, out_features="${..width}")` is the DictConfig
    `{_target_: "torch.nn.modules.linear.Linear", in_features: 4, out_features: "${..width}"}`.
    Change it by attribute assignment; `instantiate` makes the call.

    Args:
        target: a callable, or its dotted name. A callable that can be imported again is stored
            by its name, any other one as an object (which cannot be saved to YAML).

    Raises:
        TypeError: `target` is neither callable nor a name.
    """

    def __init__(self, target: Callable[..., Any] | str) -> None:
        if not callable(target) and not isinstance(target, str):
            raise TypeError(
                f"LazyCall needs a callable or its dotted name, got {target!r} "
                f"of type {type(target).__name__}"
            )
        self._target = target if isinstance(target, str) else dotted_name(target) or target

    def __repr__(self) -> str:
        return f"L({self._target if isinstance(self._target, str) else repr(self._target)})"

    def __call__(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Return the config node of the call.

        Args:
            args: none are allowed; they only exist for the message.
            kwargs: arguments of the call: plain data, nodes, interpolations or any object; and
                `_partial_` (see `instantiate`).

        Raises:
            TypeError: an argument was given by position.
        """
        if args:
            raise TypeError(
                f"{self!r} takes keyword arguments only, so that overrides can name them; "
                f"got {len(args)} by position: {', '.join(map(repr, args))}"
            )
        node: DictConfig = to_node({"_target_": self._target, **kwargs})
        return node
