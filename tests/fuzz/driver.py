"""Files drawn from seeds, and what must hold while the library reads them.

A program gives `main` two functions, one that writes the file of a seed and one that reads it. In a
process of its own, case by case, reading must return or raise a `UserError`, take at most
`SECONDS` and 3 times the file's size plus 256 MiB of memory, and do nothing else: an audit hook
notes every file that is opened for writing, removed or renamed, every program that is started,
every connection, and every import of the canary. The process leaves the seed that it works on in a
file, which names the case that ended it. With `--seed` one case is repeated and described.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dn_detr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary_module"  # nothing may import it, or call its function `called`
SECONDS = 20.0  # of the processor, for one case
WAITING = 300.0  # seconds until a case hangs, on a busy machine too
MEMORY = 256 * 2**20  # bytes beside 3 times the file's
ADDRESS_SPACE = 16 * 2**30  # so that a case that takes too much does not take the machine
START = 120.0  # seconds until a process has imported torch on a busy machine

FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.putenv", "shutil.", "subprocess.Popen", "socket.connect",
    "socket.bind", "ctypes.", "urllib.Request", "webbrowser.", "pty.spawn",
)  # fmt: skip

Write = Callable[[random.Random, Path], Path]
Read = Callable[[Path], object]


class Watch:
    """Notes what the process does that reading a file does not need."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.is_on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
        is_canary = event == "import" and str(arguments[0]).startswith(CANARY)
        if is_write or is_canary or event.startswith(FORBIDDEN):
            self.seen.append(f"{event}{arguments!r}"[:300])


def main(name: str, write: Write, read: Read) -> None:
    """Fuzz for some seconds, or repeat one case.

    Args:
        name: of the program, `tests/fuzz/NAME.py`.
        write: (random numbers, empty folder) -> the file or folder to read.
        read: reads it; may raise a `UserError`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20, help="how long to draw cases")
    parser.add_argument("--seed", type=int, help="repeat the case of this seed")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        _work(args.worker, args.seed, args.seconds, write, read)
        return
    first = random.randrange(2**31) if args.seed is None else args.seed
    print(f"fuzz {name}: first seed {first}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.json"
        command = [sys.executable, "-m", f"tests.fuzz.{name}", f"--worker={state}"]
        seconds = args.seconds if args.seed is None else 0
        ended = subprocess.run(
            [*command, f"--seed={first}", f"--seconds={seconds}"],
            cwd=ROOT,
            timeout=args.seconds + START + WAITING,
        )
        last = json.loads(state.read_text()) if state.exists() else {"seed": first, "cases": 0}
    if ended.returncode:
        seed = last["seed"]
        sys.exit(
            f"fuzz {name}: ended by {ended.returncode} at seed {seed}; again: "
            f"python -m tests.fuzz.{name} --seed {seed}"
        )
    print(f"fuzz {name}: {last['cases']} cases, of which {last['read']} were read", flush=True)


def _work(state: Path, seed: int, seconds: float, write: Write, read: Read) -> None:
    """Run cases from `seed` on; exit with 1 at the first that does what it must not."""
    used = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _too_slow)
    signal.signal(signal.SIGALRM, _too_slow)
    canary = state.parent / "canary"
    canary.mkdir()
    (canary / f"{CANARY}.py").write_text("def called(*arguments): ...\n")
    sys.path.insert(0, str(canary))
    watch = Watch()
    cases = was_read = 0
    end = time.monotonic() + seconds
    while not cases or time.monotonic() < end:
        with tempfile.TemporaryDirectory(dir=state.parent) as folder:
            path = write(random.Random(seed), Path(folder))
            state.write_text(json.dumps({"seed": seed, "cases": cases, "read": was_read}))
            error, used = _case(watch, path, read)
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            left = CANARY in sys.modules and [f"the import of {CANARY}"]
            seen = watch.seen or left or []
            if used > 3 * size + MEMORY:
                seen.append(f"{used} bytes of memory for a file of {size}")
            if error is not None and not isinstance(error, UserError):
                traceback.print_exception(error)
                seen.append(type(error).__name__)
            if not seconds:
                print(f"seed {seed}: {path.name}, {size} bytes: {error or 'read'}"[:2000])
            if seen:
                sys.exit(f"seed {seed}: {path.name} led to {'; '.join(seen)}")
        cases, was_read, seed = cases + 1, was_read + (error is None), seed + 1
    state.write_text(json.dumps({"seed": seed, "cases": cases, "read": was_read}))


def _case(watch: Watch, path: Path, read: Read) -> tuple[BaseException | None, int]:
    """Read a file; return the error, if there was one, and the memory that it took at most."""
    error: BaseException | None = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _status("VmRSS")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    watch.is_on = True
    try:
        read(path)
    except Exception as raised:
        error = raised
    finally:
        watch.is_on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return error, _status("VmHWM") - before


def _status(key: str) -> int:
    """An entry of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _too_slow(*_: object) -> None:
    # Not an Exception, which the library would take for a damaged file.
    raise SystemExit(f"a case took more than {SECONDS} seconds of the processor, or hangs")
