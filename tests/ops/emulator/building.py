"""Compiles the CUDA operators for the CPU, over the launch emulator beside this file."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "ms_deform_attn"
EMULATOR = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wno-unknown-pragmas", "-DDN_DETR_EMULATED"]
# Overflows, misaligned vectors and indices past an array end the process; `pytest -s` shows why.
CHECKS = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11


def compiler() -> str | None:
    """The C++ compiler, if one is here that is known to do."""
    return os.environ.get("CXX") or shutil.which("g++") if sys.platform == "linux" else None


def library_path() -> Path:
    """Where the library for these sources, this PyTorch and this compiler lies."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.platform} {FLAGS} {CHECKS}".encode())
    for path in sorted([*SOURCES.iterdir(), *EMULATOR.glob("*.[ch]*")]):
        digest.update(path.read_bytes())
    return ROOT / "build" / "emulator" / f"{digest.hexdigest()[:16]}.so"


def _build(compiler: str, library: Path) -> None:
    folder = library.with_suffix(".building")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
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


def build() -> Path:
    """The library ``dn_detr_emulated``, compiled unless these sources were compiled before."""
    library, program = library_path(), compiler()
    if program is None:
        raise RuntimeError("needs g++ on Linux")
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other test processes wait for the first one
        if not library.exists():
            _build(program, library)
    return library
