"""The one exception of the config package, and the suggestions that its messages carry."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

from dn_detr.errors import UserError


class ConfigError(UserError):
    """A config file, an override or a value is wrong; the message says where and the remedy."""


def did_you_mean(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Suggest the candidate nearest to a mistyped name.

    Args:
        name: what the user wrote.
        candidates: the names that exist.
        cutoff: how near it must be, up to 1 for equal.

    Returns:
        " (did you mean X?)", or "" when nothing is near.
    """
    near = get_close_matches(name, candidates, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]}?)" if near else ""


def did_you_mean_key(key: str, candidates: Iterable[str]) -> str:
    """`did_you_mean` for dotted keys, which are also near when their last components are.

    `num_workers` finds `dataloader.train.num_workers`, and `model.num_worker` finds it too.
    """
    scored = [(_key_similarity(key, candidate), candidate) for candidate in candidates]
    score, best = max(scored, default=(0.0, ""), key=lambda pair: pair[0])
    return f" (did you mean {best}?)" if score >= 0.6 else ""


def _key_similarity(key: str, candidate: str) -> float:
    whole = SequenceMatcher(None, key, candidate).ratio()
    last = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return 0.5 * whole + 0.5 * last
