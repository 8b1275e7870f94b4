"""Errors that a user can act on, and how their messages name images and long lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """What a user can act on: the message says what is wrong, where, and what helps.

    The commands show it as one message and exit with 1; every other exception keeps its traceback.
    A project derives its own errors from it.
    """


def escape_control_characters(text: str) -> str:
    """Return a text that a terminal only shows, whatever names from files are in it."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in "\n\t" else repr(found[0])[1:-1]

    return CONTROL_CHARACTERS.sub(escaped, text)


def user_message(error: UserError) -> str:
    """Return the message of an error, without the traceback that a loader's worker puts before."""
    text = escape_control_characters(str(error))
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text:
        return text
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    return text.rpartition(f"\n{name}: ")[2].strip()


def image_name(sample: Mapping[str, Any]) -> str:
    """Return what identifies an image in a message: its file name, else its id."""
    return str(sample.get("file_name", sample.get("image_id", "(no name)")))


def shortened(text: str, most: int = 200) -> str:
    """Return a text, or its first characters and how many it has."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def first_names(names: Iterable[object], count: int = 5) -> str:
    """Return the first names, joined by commas, and how many more there are.

    Args:
        names: of anything; ids, for instance.
        count: how many are shown, each of at most 200 characters.
    """
    texts = [shortened(str(name)) for name in names]
    rest = f" and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + rest
