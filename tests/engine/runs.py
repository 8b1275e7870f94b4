"""Whole runs of the training command in processes of their own, and what they leave.

The processes are forked from a server that has imported the library, because importing takes
longer than such a run. From then on they are like any other: they run the command, are signalled
and killed, start workers, and form groups of processes as torchrun's workers do.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # for the server: importing it takes a second
from torch.distributed import TCPStore

from dn_detr.checkpoint import load_checkpoint, read_manifest
from dn_detr.signals import exit_when_signalled
from tests.engine.pausing import has_paused, let_go_on, pause_at_the_end, pause_while_saving
from tools.train_net import main

CONFIG = str(Path(__file__).with_name("tiny_config.py"))
PROCESSES = multiprocessing.get_context("forkserver")

_start_processes = torch.multiprocessing.start_processes
_TIMINGS = ("data_time", "iter_time", "images_per_s", "memory_mib")
# A run is stuck that has printed and written nothing for so long, on the busiest machine.
IDLE_SECONDS = 180.0


class _Output(threading.Thread):
    """What a process writes to `sender`: a pipe, for which a limit on the size of files is none."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._receiver, self.sender = PROCESSES.Pipe(duplex=False)
        self._printed = bytearray()

    @property
    def text(self) -> str:
        return self._printed.decode()

    def run(self) -> None:
        """Read to the end, which is reached when the process has ended."""
        self.sender.close()  # the process has it
        with self._receiver:
            while printed := os.read(self._receiver.fileno(), 4096):
                self._printed += printed


class Run:
    """One process that runs the training command; a context manager that leaves none behind.

    Args:
        folder: `train.output_dir`.
        arguments: of the command: overrides and options.
        pause: places of `pausing` in the order in which the run comes there; "" for none.
        config: the config file.
        environment: of the process, besides the test's.
        name: of the folder for pauses, beside `folder`.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        pause: str = "",
        config: str = CONFIG,
        environment: Mapping[str, str] | None = None,
        name: str = "",
    ) -> None:
        name = name or f"{folder.name}-{len(list(folder.parent.iterdir()))}"
        self.folder = folder
        self._places = pause.split(",")
        self._pauses = folder.with_name(f"{name}.pauses")
        self._pauses.mkdir(exist_ok=True)
        variables = {"PAUSE_AT": pause, "PAUSE_FOLDER": str(self._pauses), **(environment or {})}
        command = ["--config-file", config, f"train.output_dir={folder}", *arguments]
        self._output = _Output()
        ends = (self._output.sender, self._output.sender)
        self._process = PROCESSES.Process(target=_run, args=(command, variables, *ends))
        self._process.start()
        self._output.start()

    @property
    def pid(self) -> int:
        """Of the process, which leads a process group."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What the process has printed."""
        return self._output.text

    def reach_pause(self) -> Run:
        """Return when the process is at its next place."""
        place = self._places[0]
        self._wait_until(lambda: has_paused(self._pauses, place), f"nothing came to {place!r}")
        return self

    def go_on(self) -> Run:
        """End the pause."""
        let_go_on(self._pauses, self._places[0])
        if len(self._places) > 1:
            del self._places[0]
        return self

    def signal(self, number: int) -> Run:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)
        return self

    def limit_file_size(self, size: int | None) -> Run:
        """Let writing more bytes than that to a file fail as on a full disk; None: no limit."""
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
        limits = (hard if size is None else size, hard)
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, limits)
        return self

    def wait_for_log(self, text: str) -> Run:
        """Return when the process has printed a text."""
        self._wait_until(lambda: text in self.log, f"no {text!r}")
        return self

    def wait_for_checkpoint(self, iteration: int) -> Run:
        """Return when a checkpoint and the results of its evaluation are on the disk."""
        folder = self.folder / "checkpoints" / f"{iteration:07d}"

        def is_written() -> bool:
            return folder.is_dir() and read_manifest(folder).metrics is not None

        self._wait_until(is_written, f"no checkpoint {iteration}")
        return self

    def _wait_until(self, condition: Callable[[], bool], failure: str) -> None:
        wait_until(lambda: condition() or not self._process.is_alive(), self._progress)
        assert condition(), f"{failure}:\n{self.log}"

    def _progress(self) -> object:
        """What changes as long as the run goes on."""
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return len(self.log), len(files)

    def wait(self, seconds: float = math.inf) -> int:
        """Return the exit code, minus the number of the signal that killed the process.

        Args:
            seconds: how long that may take, where a test is about that.
        """
        started = time.monotonic()
        wait_until(lambda: not self._process.is_alive(), self._progress)
        assert time.monotonic() - started < seconds
        self._process.join()
        assert self._process.exitcode is not None
        self._output.join(1)  # it ends with the last worker
        return self._process.exitcode

    def succeed(self) -> None:
        """Wait; the exit code has to be 0."""
        assert self.wait() == 0, self.log

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):  # with its workers
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


class Group:
    """Two processes that run the training command together; a context manager, as `Run` is.

    Args:
        folder: `train.output_dir`.
        arguments: of the command.
        pauses: the place of each process.
    """

    def __init__(self, folder: Path, *arguments: str, pauses: Sequence[str] = ("", "")) -> None:
        # Served from here, as torchrun's agent does: so the port is free for sure.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(len(pauses)),
        }
        number = len(list(folder.parent.iterdir()))
        self.runs = [
            Run(
                folder,
                *arguments,
                pause=pause,
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                name=f"{folder.name}-{number}-rank{rank}",
            )
            for rank, pause in enumerate(pauses)
        ]

    def wait(self) -> list[int]:
        """Return the exit codes."""
        return [run.wait() for run in self.runs]

    @property
    def log(self) -> str:
        """What both have printed."""
        return "\n".join(run.log for run in self.runs)

    def succeed(self) -> None:
        """Wait; the exit codes have to be 0."""
        assert self.wait() == [0] * len(self.runs), self.log

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs:
            run.__exit__()


def run_python(
    source: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `python -c` does, but in a process that need not import torch and the library.

    Args:
        source: of a program.
        arguments: of the program.
        cwd: where it runs; here by default.
        environment: variables besides the test's.
    """
    command = [source, *map(str, arguments)]
    variables = {**os.environ, **environment}  # the server has those of its start
    outputs = (_Output(), _Output())
    ends = (output.sender for output in outputs)
    process = PROCESSES.Process(
        target=_run_source, args=(command, str(cwd or Path.cwd()), variables, *ends)
    )
    process.start()
    for output in outputs:
        output.start()
    try:
        wait_until(lambda: not process.is_alive(), lambda: [len(o.text) for o in outputs])
    finally:
        process.kill()
        process.join()
    for output in outputs:
        output.join(1)  # it ends with the last worker
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, *(o.text for o in outputs))


def run_tool(
    name: str, *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command of `tools` in such a process."""
    source = f"import sys; from tools.{name} import main; sys.exit(main(sys.argv[1:]))"
    return run_python(source, *arguments, cwd=cwd, **environment)


def _run_source(
    command: list[str],
    cwd: str,
    variables: Mapping[str, str],
    stdout: Connection,
    stderr: Connection,
) -> None:
    _become_like_any_other(variables, stdout, stderr)
    os.chdir(cwd)
    sys.argv = ["-c", *command[1:]]
    exec(command[0], {"__name__": "__main__"})


def _become_like_any_other(
    variables: Mapping[str, str], stdout: Connection, stderr: Connection
) -> None:
    os.setsid()
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    os.environ.update(variables)
    multiprocessing.set_start_method(None, force=True)  # the default, for its own workers
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes = partial(start_forked, method="fork")


def _run(
    command: Sequence[str], variables: Mapping[str, str], stdout: Connection, stderr: Connection
) -> None:
    _become_like_any_other(variables, stdout, stderr)
    _break_output(variables.get("BROKEN_OUTPUT", ""))
    exit_when_signalled()  # as tools/train_net.py does
    if variables["PAUSE_AT"].startswith(("saving", "recording")):
        pause_while_saving()
    if variables["PAUSE_AT"].endswith("end"):
        pause_at_the_end()
    raise SystemExit(main(command))


def start_forked(
    run_rank: Callable[..., None],
    args: Sequence[Any],
    *,
    method: str = "forkserver",
    **options: Any,
) -> Any:
    """`torch.multiprocessing.start_processes` for `launch` whose ranks need not import torch.

    Args:
        run_rank: takes its rank, the process id of its parent and the other `args`.
        args: of `run_rank`.
        method: "fork" in a process that itself comes from the server.
        options: of `start_processes`.
    """
    options["start_method"] = method
    return _start_processes(_run_forked_rank, (run_rank, *args[1:]), **options)


def _run_forked_rank(rank: int, run_rank: Callable[..., None], *args: Any) -> None:
    run_rank(rank, os.getppid(), *args)  # which may be the server


def _break_output(how: str) -> None:
    """Let stdout and stderr be closed, a full disk, or a pipe whose reader has gone."""
    reader, writer = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    for number in (1, 2) if how else ():
        if how == "closed":
            os.close(number)
        else:
            os.dup2(full if how == "full" else writer, number)
    for number in (reader, writer, full):
        os.close(number)


def outcome(folder: Path) -> dict[str, Any]:
    """What two equal runs leave equal: the last checkpoint to the bit, results and rows."""
    last = load_checkpoint(folder / "checkpoints" / "last")
    parts = ("model", "ema", "optimizer", "training_state")
    return {
        "iteration": last.manifest.iteration,
        "results": last.manifest.metrics,
        "digests": {part: _digest(getattr(last.snapshot, part)) for part in parts},
        "best": (folder / "checkpoints" / "best").resolve().name,
        "rows": rows(folder),
    }


def _digest(content: Any) -> str:
    """Of nested content, tensors to the last bit."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what depends on the clock and the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in _TIMINGS} for row in found]


def wait_until(condition: Callable[[], bool], progress: Callable[[], object] = str) -> None:
    """Return when `condition()` is true.

    Args:
        condition: asked all the time.
        progress: the wait fails where what it returns stays the same for `IDLE_SECONDS`.
    """
    before, deadline = progress(), time.monotonic() + IDLE_SECONDS
    while not condition():
        time.sleep(0.01)
        if time.monotonic() > deadline:
            now = progress()
            assert now != before, f"nothing has happened for {IDLE_SECONDS:g} s"
            before, deadline = now, time.monotonic() + IDLE_SECONDS
