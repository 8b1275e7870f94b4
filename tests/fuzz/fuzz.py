"""Random calls of the CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer.

    make fuzz FUZZ_SECONDS=600        build what is missing, then fuzz with new seeds
    make fuzz FUZZ_SEED=123           one case again, described

Arguments that do not fit must raise a ValueError; with others, results must be those of float64 in
PyTorch and the same for every number of threads. Fresh memory is filled with NaN, so that a result
that nobody wrote is found as well. This program starts one copy of itself for each core with the
sanitizers loaded; a copy leaves the seed that it works on in a file, which names the case that
ended it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    ":quarantine_size_mb=32:malloc_context_size=4",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
SEEDS_PER_WORKER = 10**6
GRACE_SECONDS = 120  # for the start under the sanitizers and the last case


def main() -> None:
    args = _arguments()
    if args.worker is None:
        sys.exit(_start_workers(args))
    if args.seed is None:
        _fuzz(args)
    else:
        _repeat(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "build/sanitized/_C.so")
    parser.add_argument("--seconds", type=float, default=20, help="how long to draw cases")
    parser.add_argument("--seed", type=int, help="run the case of this seed only")
    parser.add_argument("--first-seed", type=int, help="instead of a random one")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- the process without sanitizers -------------------------------------------------------------


def _start_workers(args: argparse.Namespace) -> int:
    """0 if all workers end well; else 1, after saying which cases ended them."""
    first = random.randrange(2**31) if args.first_seed is None else args.first_seed
    count = args.workers if args.seed is None else 1
    if args.seed is None:
        print(f"fuzz: {count} processes, first seed {first}", flush=True)
    workers = []
    for number in range(count):
        command = [sys.executable, __file__, *sys.argv[1:], f"--worker={number}"]
        command.append(f"--first-seed={first + number * SEEDS_PER_WORKER}")
        workers.append(subprocess.Popen(command, env=_environment(), cwd=ROOT))
    end = time.monotonic() + args.seconds + GRACE_SECONDS
    failed = [number for number, worker in enumerate(workers) if not _ends_well(worker, end)]
    for number in failed:
        seed = _seed_file(args.library, number)
        seed = seed.read_text() if seed.exists() else "none"
        print(f"fuzz: failed at seed {seed}; again: make fuzz FUZZ_SEED={seed}", file=sys.stderr)
    return 1 if failed else 0


def _ends_well(worker: subprocess.Popen[bytes], end: float) -> bool:
    try:
        return worker.wait(max(end - time.monotonic(), 1)) == 0
    except subprocess.TimeoutExpired:
        worker.kill()
        return False


def _environment() -> dict[str, str]:
    """AddressSanitizer comes before all else, and finds C++ exceptions only after their library."""
    preload = [_compilers_file(name) for name in ("libasan.so", "libstdc++.so")]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **SANITIZERS,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _compilers_file(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    answer = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, check=True)
    return str(Path(answer.stdout.decode().strip()).resolve())


def _seed_file(library: Path, worker: int) -> Path:
    return library.parent / f"seed-{worker}"


# ---- the processes with sanitizers --------------------------------------------------------------


def _fuzz(args: argparse.Namespace) -> None:
    operators = _load(args.library)
    seed_file = _seed_file(args.library, args.worker)
    seed, refused, end = args.first_seed, 0, time.monotonic() + args.seconds
    while time.monotonic() < end:
        seed_file.write_text(str(seed))
        refused += _run(operators, seed)
        seed += 1
    seed_file.unlink()
    count = seed - args.first_seed
    print(f"fuzz: {count} cases, {refused} of them refused as they must be", flush=True)


def _repeat(args: argparse.Namespace) -> None:
    import cases

    operators = _load(args.library)
    _seed_file(args.library, args.worker).write_text(str(args.seed))
    case = cases.draw(args.seed)
    print(f"kernels {case.kernels}, {case.threads} threads; {'; '.join(case.notes)}")
    for name, x in case.tensors.items():
        if x is not None:
            print(f"{name}: {x.dtype} {tuple(x.shape)}, strides {x.stride()}")
    refused = _run(operators, args.seed)
    print("refused, as it must be" if refused else "as expected")


def _load(library: Path) -> Any:
    import torch

    torch.ops.load_library(str(library))
    return torch.ops.dn_detr_C


def _run(operators: Any, seed: int) -> bool:
    """Runs one case; whether it was refused.

    Raises:
        AssertionError: the operators did something else than they must.
    """
    import cases
    import torch

    case = cases.draw(seed)
    try:
        operators.use_cpu_kernels(case.kernels)
    except ValueError:
        operators.use_cpu_kernels("")
    name = "ms_deform_attn_fused" if case.fused else "ms_deform_attn"
    forward = getattr(operators, f"{name}_forward")
    backward = getattr(operators, f"{name}_backward")
    inputs = list(case.tensors.values())

    torch.set_num_threads(case.threads)
    error = case.error()
    if error is not None:
        _must_raise(case, error, forward, *inputs)
        _must_raise(case, error, backward, case.grad_output, *inputs)
        return True
    output = forward(*inputs)
    error = case.grad_error()
    if error is not None:
        _must_raise(case, error, backward, case.grad_output, *inputs)
        return True
    names = ["output", "value", *list(case.tensors)[3:]]
    results = dict(zip(names, [output, *backward(case.grad_output, *inputs)], strict=False))

    torch.set_num_threads(1)
    alone = [forward(*inputs), *backward(case.grad_output, *inputs)]
    for (name, together), single in zip(results.items(), alone, strict=True):
        assert _same_bits(together, single), f"{name} depends on the number of threads"
    _compare(case, results)
    return False


def _must_raise(case: Any, reason: str, operator: Any, *inputs: Tensor | None) -> None:
    try:
        operator(*inputs)
    except ValueError as error:
        names = [*case.tensors, "grad_output"]
        assert any(name in str(error) for name in names), f"the error names nothing: {error}"
    else:
        raise AssertionError(f"not refused: {reason}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    import torch

    same = torch.equal(a.isnan(), b.isnan())
    return same and torch.equal(a.nan_to_num(), b.nan_to_num())


def _compare(case: Any, results: dict[str, Tensor]) -> None:
    """Results against plain PyTorch in float64, where the same numbers can be expected."""
    import torch

    from dn_detr.ops import eager

    inputs = [
        x.double() if x is not None and x.is_floating_point() else x for x in case.tensors.values()
    ]
    forward = eager.fused_forward if case.fused else eager.forward
    backward = eager.fused_backward if case.fused else eager.backward
    wanted = [forward(*inputs), *backward(case.grad_output.double(), *inputs)]
    shapes = case.tensors["spatial_shapes"]
    longest = int(shapes.clamp_max(1000).max()) if shapes.numel() else 0
    for (name, got), expected in zip(results.items(), wanted, strict=True):
        assert got.shape == expected.shape, name
        if name not in case.same_numbers or not got.numel():
            continue
        assert torch.equal(got.isfinite(), expected.isfinite()), f"{name}: other NaN or infinity"
        largest = max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
        error = float((got.double() - expected).nan_to_num(0, 0, 0).abs().max()) / largest
        assert error <= _tolerance(got) * (1 + longest / 100), f"{name}: error {error:.1e}"


def _tolerance(result: Tensor) -> float:
    """Of the largest number; more than the tests' own, for there are millions of cases."""
    import torch

    rounding = {torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    return rounding.get(result.dtype, 0.0) * 1.05 + (
        1e-11 if result.dtype == torch.float64 else 1e-4
    )


if __name__ == "__main__":
    main()
