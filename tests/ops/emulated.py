"""Builds the CUDA kernels and their binding for the CPU, over a small launch emulator (emulator/).

The same sources are compiled by a C++ compiler and registered for CPU tensors as the library
`dn_detr_emulated`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "ms_deform_attn"
EMULATOR = Path(__file__).parent / "emulator"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wno-unknown-pragmas", "-DDN_DETR_EMULATED"]
# Overflows, misaligned vectors and indices past an array end the process; `pytest -s` shows why.
CHECKS = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11


@cache
def library() -> Path | None:
    """The library of these sources, built if it is not there yet; None without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    path = ROOT / "build" / "emulator" / f"{_digest()}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:  # test processes wait for the one that builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(compiler, path)
    return path


def _digest() -> str:
    """Of these sources, this PyTorch and these flags."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.platform} {FLAGS} {CHECKS}".encode())
    sources = [*SOURCES.glob("cuda*"), SOURCES / "inputs.h", SOURCES / "value_type.h"]
    for path in sorted([*sources, *EMULATOR.iterdir()]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: str, library: Path) -> None:
    folder = library.with_suffix(".building")
    folder.mkdir(exist_ok=True)
    torch_includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    units = {
        "kernels": [*CHECKS, "-x", "c++", SOURCES / "cuda.cu"],
        "binding": [STABLE_ABI, *torch_includes, SOURCES / "cuda.cpp"],
        "emulator": [EMULATOR / "emulator.cpp"],
    }
    running = []
    for name, arguments in units.items():
        command = [compiler, *FLAGS, f"-I{EMULATOR}", *arguments, "-c", "-o", folder / f"{name}.o"]
        running.append(subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "".join(errors)
    objects = [folder / f"{name}.o" for name in units]
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    command = [compiler, "-shared", *CHECKS, *objects, *torch_libraries]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", folder / library.name]
    subprocess.run(list(map(str, command)), check=True)
    (folder / library.name).rename(library)
    shutil.rmtree(folder)
