"""What benchmarks share: median times of functions in turns, memory, the machine's name."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

GPU_PAUSE = 50_000_000  # clock cycles, about 25 ms


Run = Callable[[], Any]


def medians(
    runs: Mapping[str, Run], rounds: int, measure: Callable[[Run], float] | None = None
) -> dict[str, float]:
    """Median seconds of functions that run in turns, after one round to warm up.

    `measure` gives the time of one of them; by default :func:`seconds`.
    """
    measure = measure or seconds
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = measure(run)
            if number:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(run: Run) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def thread_seconds(run: Run) -> float:
    """Processor time that this thread gets for one call: other programs do not count."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def gpu_seconds(run: Run, calls: int = 5) -> float:
    """Time of one call on the GPU, of several that follow each other without a gap."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(GPU_PAUSE)  # meanwhile the calls queue up
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def launch_seconds(run: Run) -> float:
    """Time of the program for one call, while the GPU is busy with something else."""
    torch.cuda.synchronize()
    torch.cuda._sleep(GPU_PAUSE)
    taken = seconds(run)
    torch.cuda.synchronize()
    return taken


def memory_mb(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak; NaN where Linux's /proc is missing."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next(
        (int(x.split()[1]) / 1024 for x in lines if x.startswith(field + ":")), float("nan")
    )


def machine(kernels: str) -> str:
    """Processor (the GPU for "cuda" kernels), the operators' kernels, torch, date, commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    if kernels == "cuda":
        cpu = torch.cuda.get_device_name()
    date = time.strftime("%Y-%m-%d")
    return f"{cpu}, {kernels}, torch {torch.__version__}, {date}, commit {_commit()}"


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return git.stdout.strip() or "unknown"
