"""The compiled operators: the shared library ``dn_detr/_C.so`` that the installation builds.

It is loaded when it is first asked for. Without it, or for a device that it was not built for, the
operators compute in plain PyTorch; :func:`missing_kernels` says why.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"

KERNELS = ("auto", "pytorch")
_chosen = os.environ.get("DN_DETR_KERNELS", "auto")


@contextmanager
def use_kernels(kernels: str) -> Iterator[None]:
    """Choose the kernels of the operators while the context lasts, in all threads.

    The environment variable ``DN_DETR_KERNELS`` chooses for a whole process.

    Args:
        kernels: ``"auto"``, the compiled ones where there are any, or ``"pytorch"``.

    Raises:
        ValueError: another name.
    """
    global _chosen
    _check_choice(kernels)
    before, _chosen = _chosen, kernels
    try:
        yield
    finally:
        _chosen = before


def _check_choice(kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"there are no kernels {kernels!r}; choose one of {', '.join(KERNELS)}")


@cache
def loading_problem() -> str | None:
    """Loads the library; why that is impossible, or None."""
    if not LIBRARY.is_file():
        return "dn_detr was installed without building its operators"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} cannot be loaded: {error}"
    return None


@cache
def missing_kernels(device: str) -> str | None:
    """Why there are no compiled kernels for a type of device ("cpu", "cuda", ...), or None."""
    problem = loading_problem()
    if problem is not None:
        return problem
    name = "dn_detr_C::ms_deform_attn_fused_forward"
    if device in ("cpu", "cuda"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()):
            return None
        return f"dn_detr's operators were built without {device.upper()}"
    return f"dn_detr has no operators for {device}"


@cache
def _warn_once(device: str, problem: str) -> None:
    warnings.warn(
        f"Deformable attention on {device} uses slow PyTorch kernels, because {problem}. "
        "`python -m dn_detr.collect_env` says more; DN_DETR_KERNELS=pytorch silences this.",
        stacklevel=2,
    )


def compiled_operators(device: torch.device) -> Any | None:
    """``torch.ops.dn_detr_C`` where its kernels are to be used, else None.

    Warns, once for each type of device, if they are missing but wanted.

    Raises:
        ValueError: ``DN_DETR_KERNELS`` has another value than those of :func:`use_kernels`.
    """
    _check_choice(_chosen)
    if _chosen == "pytorch":
        return None
    problem = missing_kernels(device.type)
    if problem is None:
        return torch.ops.dn_detr_C
    _warn_once(device.type, problem)
    return None
