"""Which value may replace which: the type rules of overrides."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from .errors import ConfigError

_EPOCHS = re.compile(r"\d+(\.\d+)?ep")


def fit_value(key: str, old: Any, new: Any) -> Any:
    """Fit a new value to the type of the old one.

    An int may replace a float and becomes one; null replaces anything and is replaced by
    anything. A list's elements must each fit one of the old elements. A key named `period` or
    `..._period` that holds an int or "Nep" takes either.

    Args:
        key: dotted key, for the period rule and the message.
        old: plain value that is replaced.
        new: plain value.

    Returns:
        `new`, converted where the rules say so.

    Raises:
        ConfigError: it does not fit.
    """
    if old is None or new is None:
        return new
    if _is_period_key(key) and _is_period(old):
        if not _is_period(new):
            raise _mismatch(key, 'an int (iterations) or "Nep" such as 1ep or 0.5ep (epochs)', new)
        return new
    if isinstance(old, list):
        if not isinstance(new, list):
            raise _mismatch(key, f"a list as in {reprlib.repr(old)}", new)
        examples = [example for example in old if example is not None]
        return [_fit_element(f"{key}.{index}", examples, item) for index, item in enumerate(new)]
    if type(old) is float and type(new) is int:
        return float(new)
    if not _same_kind(old, new):
        example = f" as in {reprlib.repr(old)}" if old != {} else ""
        raise _mismatch(key, f"{_kind(old)}{example}", new)
    return new


def _fit_element(key: str, examples: list[Any], new: Any) -> Any:
    if not examples:
        return new
    same_type = [example for example in examples if type(example) is type(new)]
    errors = []
    for example in same_type + examples:
        try:
            return fit_value(key, example, new)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _same_kind(old: Any, new: Any) -> bool:
    for kind in (bool, int, float, str, dict):
        if isinstance(old, kind):
            return isinstance(new, kind) and isinstance(new, bool) == isinstance(old, bool)
    return type(old) is type(new)


def _is_period_key(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name == "period" or name.endswith("_period")


def _is_period(value: Any) -> bool:
    if isinstance(value, str):
        return _EPOCHS.fullmatch(value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {str: "a str", int: "an int", float: "a float", bool: "a bool"}
    return names.get(type(value), f"a {type(value).__name__}")


def _mismatch(key: str, expected: str, new: Any) -> ConfigError:
    remedy = ""
    if expected.startswith("a str") and isinstance(new, (int, float)):
        # without the value: 1e3 and 2024_11_25 were read as numbers, which print otherwise
        remedy = f"; put a text in quotes: \"{key}='...'\""
    return ConfigError(f"{key} takes {expected}, not {reprlib.repr(new)} ({_kind(new)}){remedy}")
