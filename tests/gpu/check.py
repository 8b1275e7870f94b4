"""Builds the CUDA operators for this machine's GPU, tests and measures them, and prints one table.

    make gpu-check [GPU_PYTHON=python3] [GPU_WHEELS=folder]

Needs an NVIDIA GPU, PyTorch and nvcc, and downloads nothing: Python packages that are missing are
taken from the folder of wheels and lie in output/gpu-check afterwards, with the logs and the
table. The exit status is 1 if a test failed or was skipped, or if the benchmark broke off; speed
does not count, as it depends on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "output" / "gpu-check"
PACKAGES = OUTPUT / "packages"
NEEDED = {  # module: distribution; detectors need all of them, operators the first two
    "pytest": "pytest",
    "setuptools": "setuptools",
    "antlr4": "antlr4-python3-runtime",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "yaml": "PyYAML",
}
ESSENTIAL = ("pytest", "setuptools")


class Line(NamedTuple):
    """Of the table."""

    check: str
    result: str
    details: str


# ---- what the machine has ----


def architecture() -> str:
    """The GPU's, as TORCH_CUDA_ARCH_LIST names it; ends the program where there is none."""
    if find_spec("torch") is None:
        sys.exit(f"gpu-check needs PyTorch, which {sys.executable} lacks: name another GPU_PYTHON.")
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check needs an NVIDIA GPU that PyTorch can use; there is none here.")
    return "{}.{}".format(*torch.cuda.get_device_capability())


def install(wheels: Path | None) -> None:
    """Installs what is missing from a folder of wheels; ends the program without the essentials."""
    missing = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if missing and wheels is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                   "--upgrade", "--find-links", str(wheels), "--target", str(PACKAGES)]  # fmt: skip
        subprocess.run([*command, *missing], check=True)
    elif missing:
        print(f"Missing here: {', '.join(missing)}. GPU_WHEELS=folder would install them.")
        if any(name in missing for name in ESSENTIAL):
            sys.exit("gpu-check cannot do without pytest and setuptools.")


def machine() -> str:
    """GPU, torch, date, commit."""
    sys.path.append(str(ROOT / "benchmarks"))
    import timing

    return timing.machine("cuda")


# ---- the checks ----


def run(log: str, *command: str, **environment: str) -> bool:
    """Whether a Python program succeeded; its output goes to a file, whose end tells of failure."""
    path = OUTPUT / log
    folders = [str(ROOT), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, folders))
    }  # fmt: skip
    print(f"{' '.join(command)} > {path.relative_to(ROOT)}", flush=True)
    with path.open("w") as file:
        process = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    if process.returncode:
        print("".join(path.read_text().splitlines(keepends=True)[-60:]))
    return process.returncode == 0


def build(arch: str) -> Line:
    succeeded = run("build.log", "setup.py", "build_ext", "--inplace",
                    DN_DETR_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)  # fmt: skip
    return Line(f"build for compute capability {arch}", "ok" if succeeded else "FAILED", "")


def test() -> list[Line]:
    report = OUTPUT / "tests.xml"
    report.unlink(missing_ok=True)
    run("tests.log", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu",
        f"--junitxml={report}")  # fmt: skip
    return test_lines(report) if report.exists() else [Line("tests", "FAILED", "no report")]


def test_lines(report: Path) -> list[Line]:
    """One line for each test function, and one for each module that could not be read."""
    outcomes: dict[str, list[Any]] = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        problem = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        outcomes[f"{module.removeprefix('test_')}: {name}"].append(problem)
    return [_test_line(name, problems) for name, problems in outcomes.items()]


def _test_line(name: str, problems: list[Any]) -> Line:
    skipped = [x for x in problems if x is not None and x.tag == "skipped"]
    failed = [x for x in problems if x is not None and x.tag != "skipped"]
    passed = len(problems) - len(skipped) - len(failed)
    result = "FAILED" if failed else "skipped" if skipped else "ok"
    counts = {"passed": passed, "failed": len(failed), "skipped": len(skipped)}
    details = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    reason = next((x.get("message", "") for x in (*failed, *skipped)), "").split("\n")[0]
    return Line(name, result, f"{details}: {reason[:100]}" if reason else details)


def measure() -> list[Line]:
    rows = OUTPUT / "benchmark.json"
    rows.unlink(missing_ok=True)
    succeeded = run("benchmark.log", "benchmarks/ms_deform_attn.py", "--device", "cuda",
                    "--batches", "1", "--json", str(rows))  # fmt: skip
    if not succeeded:
        return [Line("benchmark", "FAILED", "")]
    return [_speed_line(row) for row in json.loads(rows.read_text())]


def _speed_line(row: dict[str, Any]) -> Line:
    parts = [f"{row['ours_ms']:.3f} ms against {row['reference_ms']:.3f} ms"]
    if row["must"] is not None:
        parts.append(f"must {row['must']:g}x: {row['reached']}")
    if row["over_floor"] is not None:
        parts.append(f"{row['over_floor']:.1f} times an H200's floor")
    parts.append(f"{row['launch_ms']:.3f} ms to launch")
    if row["max_error"] is not None:
        parts.append(f"error {row['max_error']:.0e}")
    name = f"{row['case']}, {row['pass']}, {row['dtype']}"
    return Line(name, f"{row['ratio']:.1f}x", ", ".join(parts))


# ---- the table ----


def print_table(title: str, lines: list[Line]) -> None:
    """To the terminal and to table.txt."""
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    rows = [f"{x.check:<{widths[0]}}  {x.result:>{widths[1]}}  {x.details}" for x in lines]
    text = "\n".join([title, *(row.rstrip() for row in rows)])
    (OUTPUT / "table.txt").write_text(text + "\n")
    print(f"\n{text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing")
    wheels = parser.parse_args().wheels
    arch = architecture()
    sys.path.append(str(PACKAGES))  # what an earlier run installed
    PACKAGES.mkdir(parents=True, exist_ok=True)
    install(wheels)
    lines = [build(arch)]
    if lines[0].result == "ok":
        lines += [*test(), *measure()]
    print_table(machine(), lines)
    return int(any(line.result in ("FAILED", "skipped") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
