"""Memory that C's allocator keeps, instead of fetching it from the kernel for every large tensor.

glibc hands blocks of more than 32 MiB back to the kernel when they are freed, so every large map of
every step is mapped, zeroed and faulted in page by page: a fifth of a forward pass on two threads
(docs/performance.md). With this setting the process keeps what it has had. Training and evaluation
call it; importing dn_detr does not.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep freed memory, unless `DN_DETR_MALLOC=0` forbids it.

    Resident memory then stays at its peak. Allocators other than glibc's are not touched.

    Returns:
        Whether the setting is in force.

    Raises:
        ValueError: `DN_DETR_MALLOC` is neither 0 nor 1.
    """
    choice = os.environ.get("DN_DETR_MALLOC") or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"DN_DETR_MALLOC is {choice!r}; choose 0 or 1")
    mallopt = _function("mallopt")
    if choice == "0" or mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give the kernel back what is kept, once: after a step that did not fit into memory."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    """One of glibc's; other C libraries have none, or one that does nothing."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
