"""What benchmarks share: median times of functions in turns, memory, the machine's name."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def medians(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of functions that run in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if number:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory_mb(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak; NaN where Linux's /proc is missing."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next(
        (int(x.split()[1]) / 1024 for x in lines if x.startswith(field + ":")), float("nan")
    )


def machine(kernels: str) -> str:
    """Processor, the operators' kernels, torch, date, commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    date = time.strftime("%Y-%m-%d")
    return f"{cpu}, {kernels}, torch {torch.__version__}, {date}, commit {git.stdout.strip()}"
