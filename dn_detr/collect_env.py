"""The environment of a run, and what a bug report needs: `python -m dn_detr.collect_env`.

Versions, commit, devices, which kernels compute deformable attention on each of them, and where
compiled kernels are missing, why.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .ops import build_info, missing_kernels
from .ops.library import CPU_LIBRARY, CUDA_LIBRARY, KERNELS

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "omegaconf",
    "hydra-core",
    "pycocotools",
    "pillow",
    "safetensors",
    "timm",
    "transformers",
    "triton",
    "setuptools",
)
VARIABLES = (
    "DN_DETR_KERNELS",
    "DN_DETR_CPU_KERNELS",
    "DN_DETR_MALLOC",
    "DN_DETR_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def describe_environment() -> str:
    """Return what a reader needs to repeat a run or to find a fault.

    Returns:
        A "name: value" per line, in blocks.
    """
    system = {
        "command": " ".join([sys.executable, *sys.argv]),
        "git commit": _git_commit(),
        "platform": platform.platform(),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "dn_detr": f"{__version__} ({CPU_LIBRARY.parent})",
    }
    devices = {
        "CPU": f"{_cpu_name()}, {os.cpu_count()} logical cores",
        "threads": f"{torch.get_num_threads()} (of torch; OMP_NUM_THREADS sets them)",
        "CUDA of torch": str(torch.version.cuda or "none, torch was built for CPUs"),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            devices[f"GPU {index}"] = (
                f"{device.name}, compute capability {device.major}.{device.minor}, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )
    else:
        devices["GPU"] = "none that torch can use"
    operators = {f"kernels for {device}": _kernels(device) for device in ("cpu", "cuda")}
    built = build_info()
    for path in (CPU_LIBRARY, CUDA_LIBRARY):
        operators[str(path)] = _origin(built[path.name]) if path.name in built else "not usable"
    packages = {name: _version(name) for name in PACKAGES}
    variables = {name: os.environ.get(name, "not set") for name in VARIABLES}
    blocks = (system, packages, devices, operators, variables)
    return "\n".join("".join(f"{name}: {block[name]}\n" for name in block) for block in blocks)


def _git_commit() -> str:
    """Return the commit of the checkout that holds this file, "-dirty" appended if changed."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return "not a checkout"
    # exclude: the commit itself, not its distance from a tag
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {getattr(error, 'stderr', error)}".strip()
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    """In the words of the kernel where there are any."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(errors="replace") if information.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name.group(1) if name else platform.processor() or platform.machine()


def _kernels(device: str) -> str:
    wish = os.environ.get("DN_DETR_KERNELS") or "auto"
    if wish not in KERNELS:
        return f"none: DN_DETR_KERNELS is {wish!r}, not one of {', '.join(KERNELS)}"
    if wish == "pytorch":
        return "PyTorch (slow): DN_DETR_KERNELS is 'pytorch'"
    if problem := missing_kernels(device):
        return f"PyTorch (slow): {problem}"
    if device == "cuda":
        return "compiled"
    chosen = torch.ops.dn_detr_C.cpu_kernels()
    wish = os.environ.get("DN_DETR_CPU_KERNELS", "")
    note = "" if wish in ("", chosen) else f" (not {wish!r}, which DN_DETR_CPU_KERNELS names)"
    return f"compiled, {chosen}{note}"


def _origin(info: dict[str, str]) -> str:
    """What a library was built with, and whether csrc/ has changed since."""
    parts = [f"built with torch {info['torch']}", info["compiler"]]
    if "nvcc" in info:
        parts.append(f"nvcc {info['nvcc']} for {info['architectures']}")
    sources = CPU_LIBRARY.parents[1] / "csrc"
    if sources.is_dir() and _digest(sources) != info["sources"]:
        parts.append(f"OUTDATED: {sources} has changed since; install dn_detr again")
    return ", ".join(parts)


def _digest(sources: Path) -> str:
    """As setup.py has it."""
    files = sorted(p for p in sources.rglob("*") if p.suffix in (".cpp", ".cu", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


if __name__ == "__main__":
    print(describe_environment(), end="")
