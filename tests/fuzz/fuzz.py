"""Random calls of the compiled operators under AddressSanitizer and UndefinedBehaviorSanitizer.

    make fuzz FUZZ_SECONDS=600        build what is missing, then fuzz with new seeds
    make fuzz FUZZ_SEED=123           one case again, described
    make fuzz FUZZ_LIBRARY=emulated   the CUDA kernels, as the tests' emulator runs them

cases.py draws the arguments and check.py says what must hold. Fresh memory is filled with NaN, so
that a result that was never written is found as well. This program starts one copy of itself for
each core with the sanitizers loaded; a copy leaves the seed that it works on in a file, which names
the case that ended it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

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
    parser.add_argument("--library", type=Path, default=ROOT / "build/sanitized/C.so")
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
        _seed_file(args.library, number).unlink(missing_ok=True)
        workers.append(subprocess.Popen(command, env=_environment(), cwd=ROOT))
    end = time.monotonic() + args.seconds + GRACE_SECONDS
    failed = [number for number, worker in enumerate(workers) if not _ends_well(worker, end)]
    for number in failed:
        seed = _seed_file(args.library, number)
        seed = seed.read_text() if seed.exists() else "none"
        again = f"make fuzz FUZZ_LIBRARY={args.library.stem} FUZZ_SEED={seed}"
        print(f"fuzz: failed at seed {seed}; again: {again}", file=sys.stderr)
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


# ---- the processes with sanitizers: only they import torch --------------------------------------


def _fuzz(args: argparse.Namespace) -> None:
    import cases
    import check

    operators = check.load(args.library)
    seed_file = _seed_file(args.library, args.worker)
    seed, refused, end = args.first_seed, 0, time.monotonic() + args.seconds
    while time.monotonic() < end:
        seed_file.write_text(str(seed))
        refused += check.check(operators, cases.draw(seed))
        seed += 1
    seed_file.unlink()
    count = seed - args.first_seed
    print(f"fuzz: {count} cases, {refused} of them refused as they must be", flush=True)


def _repeat(args: argparse.Namespace) -> None:
    import cases
    import check

    operators = check.load(args.library)
    _seed_file(args.library, args.worker).write_text(str(args.seed))
    case = cases.draw(args.seed)
    print(f"kernels {case.kernels}, {case.threads} threads; {'; '.join(case.notes)}")
    for name, x in [*case.tensors.items(), ("grad_output", case.grad_output)]:
        if x is not None:
            print(f"{name}: {x.dtype} {tuple(x.shape)}, strides {x.stride()}", flush=True)
    print("refused, as it must be" if check.check(operators, case) else "as expected")


if __name__ == "__main__":
    main()
