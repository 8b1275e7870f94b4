"""The compiled operators: the shared libraries that the installation builds.

`dn_detr/_C.so` registers the operators and their kernels for CPUs, `dn_detr/_C_cuda.so` adds
those for CUDA. Each is loaded when it is first asked for. Where one is missing, the operators
compute in plain PyTorch; `missing_kernels` says why.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Of the schemas in csrc/; to be raised when they change. setup.py gives it to the libraries.
INTERFACE = 1
CPU_LIBRARY, CUDA_LIBRARY = (
    Path(__file__).resolve().parents[1] / name for name in ("_C.so", "_C_cuda.so")
)

KERNELS = ("auto", "pytorch")
# The choice of the process, and those of the contexts that threads have entered and not left.
_choices: dict[object, str] = {None: os.environ.get("DN_DETR_KERNELS") or "auto"}


@contextmanager
def use_kernels(kernels: str) -> Iterator[None]:
    """Choose the kernels of the operators while the context lasts, in all threads.

    Of contexts that overlap the one entered last counts: backward passes run in other threads.
    The environment variable `DN_DETR_KERNELS` chooses for a whole process.

    Args:
        kernels: `"auto"`, the compiled ones where there are any, or `"pytorch"`.

    Raises:
        ValueError: another name.
    """
    _check_choice(kernels)
    context = object()
    _choices[context] = kernels
    try:
        yield
    finally:
        del _choices[context]


def _check_choice(kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"there are no kernels {kernels!r}; choose one of {', '.join(KERNELS)}")


class LibraryMissingError(Exception):
    """Why a library cannot be used."""


@cache
def load(path: Path) -> ctypes.CDLL:
    """The library, whose operators PyTorch knows from now on.

    Raises:
        LibraryMissingError: it was not built, cannot be loaded or belongs to another dn_detr.
    """
    if not path.is_file():
        raise LibraryMissingError(_why_not_built(path))
    if _is_cut_off(path):
        raise LibraryMissingError(f"{path} is cut off; install dn_detr again")
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryMissingError(f"{path} cannot be loaded ({error})") from error
    found = library.dn_detr_interface() if hasattr(library, "dn_detr_interface") else 0
    if found != INTERFACE:
        raise LibraryMissingError(
            f"{path} has interface {found}, but this dn_detr needs {INTERFACE}; install dn_detr "
            "again"
        )
    return library


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its last table; to load one would kill the process."""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":  # what is no 64-bit ELF is the loader's business
        return False
    if len(header) < 64:
        return True
    (start,) = struct.unpack_from("<Q", header, 40)  # of the section headers
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < start + size * count


def _why_not_built(path: Path) -> str:
    """What the installation left in the place of a library."""
    reason = path.with_suffix(".missing.txt")
    if not reason.is_file():
        return f"the installation built no {path.name}"
    first, *others = reason.read_text(encoding="utf-8").strip().splitlines()
    more = f" (all of it: {reason})" if others else ""
    return f"the installation built no {path.name}: {first}{more}"


@cache
def missing_kernels(device: str) -> str | None:
    """Why there are no compiled kernels for a type of device ("cpu", "cuda", ...), or None."""
    if device not in ("cpu", "cuda"):
        return f"dn_detr has no kernels for {device}"
    try:
        load(CPU_LIBRARY)
        if device == "cpu":
            return None
        library = load(CUDA_LIBRARY)
    except LibraryMissingError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    library.dn_detr_cuda_problem.restype = ctypes.c_char_p
    problem = library.dn_detr_cuda_problem()
    return f"the kernels of {CUDA_LIBRARY} cannot run ({problem.decode()})" if problem else None


def build_info() -> dict[str, dict[str, str]]:
    """What built each library that can be used, by its name.

    Returns:
        Of `"_C.so"` and `"_C_cuda.so"` those that can be loaded, each with `"torch"`,
        `"compiler"`, `"sources"` (a digest of csrc/) and, for CUDA, `"nvcc"` and
        `"architectures"`.
    """
    result = {}
    for path in (CPU_LIBRARY, CUDA_LIBRARY):
        try:
            library = load(path)
        except LibraryMissingError:
            continue
        library.dn_detr_build_info.restype = ctypes.c_char_p
        result[path.name] = json.loads(library.dn_detr_build_info())
    return result


_ARGUMENTS = (
    *("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"),
    *("reference_points", "offsets", "logits", "padding_mask", "grad_output"),
)


def call(operator: Callable[..., Any], *arguments: Any) -> Any:
    """`operator(*arguments)`, whose complaints about arguments are always ValueErrors.

    PyTorch 2.15 makes a RuntimeError of C++'s std::invalid_argument; older ones a ValueError.
    """
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if type(error) is RuntimeError and str(error).startswith(_ARGUMENTS):
            raise ValueError(str(error)) from None
        raise


def compiled_operators(device: torch.device) -> Any | None:
    """`torch.ops.dn_detr_C` where its kernels are to be used, else None.

    Warns, once for each type of device, if they are missing but wanted.

    Raises:
        ValueError: `DN_DETR_KERNELS` has another value than those of `use_kernels`.
    """
    chosen = [*_choices.values()][-1]
    _check_choice(chosen)
    if chosen == "pytorch":
        return None
    problem = missing_kernels(device.type)
    if problem is None:
        return torch.ops.dn_detr_C
    _warn_once(device.type, problem)
    return None


@cache
def _warn_once(device: str, problem: str) -> None:
    warnings.warn(
        f"Deformable attention on {device} uses slow PyTorch kernels, because {problem}. "
        "`python -m dn_detr.collect_env` says more; DN_DETR_KERNELS=pytorch silences this",
        stacklevel=2,
    )
