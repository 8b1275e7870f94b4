"""The global random number generators: seeding, saving, restoring."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators, CUDA included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other libraries draw from the global one
    torch.manual_seed(seed)


def capture_random_state() -> dict[str, Any]:
    """Return the state of all global generators in types that `torch.load(weights_only)` reads."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": _with_key(numpy_state, np.ndarray.tolist),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators back into a captured state."""
    random.setstate(state["python"])
    np.random.set_state(_with_key(state["numpy"], np.uint32))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Forget the random numbers drawn inside, so that evaluating does not change the training."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _with_key(state: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Convert the one array in NumPy's state."""
    inner = state["state"]
    return {**state, "state": {**inner, "key": convert(inner["key"])}}
