"""Starting one process or many, passing signals on to them, and telling how they ended.

A group of processes comes from torchrun, or from `launch` with a number of processes on this
machine.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from dn_detr.errors import UserError, user_message

from .devices import parse_device, require_gpus
from .stopping import EXIT_SIGNAL, EXIT_STOPPED, STOP_SIGNALS, KilledError, Stopped

# Long enough for rank 0 to run COCOeval while the others wait.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Processes whose group lost a member have this long to say so before they are terminated.
_FAREWELL_SECONDS = 5.0


class LaunchError(UserError):
    """The processes cannot be started as asked, or a started one reported a mistake of a user."""


class ProcessFailure(RuntimeError):
    """A started process failed; the message is its traceback."""


def launch(
    function: Callable[..., object],
    num_gpus: int | None = None,
    *args: Any,
    device: str = "auto",
) -> None:
    """Run `function(*args)` in one process, in `num_gpus` processes, or as a part of torchrun's.

    Signals that ask this process to stop reach started processes through it, once each: they
    leave the process group of the terminal.

    Args:
        function: importable by name; its return value is dropped.
        num_gpus: number of processes on this machine, one GPU each, or that many CPU processes
            with `device="cpu"`. None: one process, or torchrun's group where its environment
            variables are set.
        args: passed to `function`; picklable if more than one process is started.
        device: as `train.device`; decides between nccl and gloo.

    Raises:
        LaunchError: more GPUs than there are, or torchrun and `num_gpus` disagree, or `function`
            reported a user's mistake in a started process.
        ProcessFailure: a started process failed otherwise.
        Stopped: `function` stopped on request.
        KilledError: a second signal, or the end of the grace period, ended a started process.
    """
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        _require_agreement_with_torchrun(num_gpus)
        with _process_group(parse_device(device).type, "env://"):
            function(*args)
        return
    if num_gpus is not None:
        _require_processes(num_gpus, device)
    if num_gpus is None or num_gpus == 1:
        function(*args)
    else:
        _spawn(function, num_gpus, args, device)


def _require_processes(num_gpus: int, device: str) -> None:
    if num_gpus < 1:
        raise LaunchError(f"--num-gpus {num_gpus}: expected at least 1")
    if device != "cpu" and num_gpus > torch.cuda.device_count():
        raise LaunchError(
            f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()} GPU(s); "
            f"train.device=cpu makes it {num_gpus} CPU process(es)"
        )


def _require_agreement_with_torchrun(num_gpus: int | None) -> None:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if num_gpus is not None and num_gpus != local_world_size:
        raise LaunchError(
            f"--num-gpus {num_gpus} under torchrun with {local_world_size} processes per node: "
            "drop --num-gpus, torchrun decides"
        )


@contextmanager
def _process_group(device_type: str, init_method: str) -> Iterator[None]:
    """Join the group that the environment describes; leave it when all went well."""
    is_cuda = device_type == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else None
    if device is not None:
        require_gpus(int(os.environ["LOCAL_RANK"]) + 1, "cuda")
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        device_id=device,
        store=_meeting_place(init_method),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield
    except BaseException as error:
        # Unless all stop together, nccl's teardown would wait for processes that are stuck in a
        # collective; they are freed by the end of this one, or by whoever started them.
        if isinstance(error, Stopped) or not is_cuda:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meeting_place(init_method: str) -> dist.Store:
    """Return where the processes of the group find each other's addresses.

    torchrun keeps the store when it restarts its processes, which must not find those of the
    processes before them.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    places = rendezvous(init_method, rank, world_size, timeout=COLLECTIVE_TIMEOUT)
    store, _, _ = next(iter(places))
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _spawn(function: Callable[..., object], count: int, args: tuple[Any, ...], device: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dn_detr_launch_") as name:
        folder = Path(name)
        try:
            with _signals_passed_on() as pass_on_to:
                group = multiprocessing.start_processes(
                    _run_child,
                    args=(os.getpid(), count, folder, device, function, args),
                    nprocs=count,
                    join=False,
                    start_method="spawn",
                )
                pass_on_to(group.processes)
                while not group.join(grace_period=_FAREWELL_SECONDS):
                    pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            _raise_first_failure(folder, error)
        if stops := list(folder.glob("stopped_*")):
            raise Stopped(stops[0].read_text(encoding="utf-8"))


@contextmanager
def _signals_passed_on() -> Iterator[Callable[[Sequence[Any]], None]]:
    """Send every request to stop on to processes, which the function that is given starts with."""
    processes: list[Any] = []
    early: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield processes.extend
        return

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        if not processes:
            early.append(number)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def pass_on_to(started: Sequence[Any]) -> None:
        processes.extend(started)
        for number in early:
            pass_on(number)

    wakeup = signal.set_wakeup_fd(-1)  # whoever reads signals there would not pass them on
    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield pass_on_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def _run_child(
    index: int,
    parent: int,
    count: int,
    folder: Path,
    device: str,
    function: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    # torch has asked for a signal at the parent's death, but only after the imports, which take
    # seconds: nobody is told of a death before.
    if os.getppid() != parent:
        raise SystemExit(f"process {index} ends: the one that started it is gone")
    os.setpgid(0, 0)  # a terminal signals its whole group, and the parent passes signals on
    identity = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in identity.items()})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    try:
        # A file store needs no free port, so two runs on one machine cannot collide.
        with _process_group(parse_device(device).type, f"file://{folder}/store"):
            try:
                function(*args)
            except Stopped:
                raise
            except Exception as error:
                # before this process leaves the group, which makes the others fail
                _record_failure(folder, index, error)
                raise
    except Stopped as stop:
        (folder / f"stopped_{index}").write_text(str(stop), encoding="utf-8")


def _record_failure(folder: Path, index: int, error: Exception) -> None:
    user_error = isinstance(error, UserError)
    text = user_message(error) if isinstance(error, UserError) else traceback.format_exc()
    failure = {"time": time.time(), "rank": index, "user_error": user_error, "text": text}
    (folder / f"failure_{index}.json").write_text(json.dumps(failure), encoding="utf-8")


def _raise_first_failure(
    folder: Path, error: ProcessExitedException | ProcessRaisedException
) -> None:
    """Raise what the first process to fail said: the others fail because it is gone."""
    code = getattr(error, "exit_code", 0)
    if code == EXIT_STOPPED or -code in STOP_SIGNALS:  # no training had begun that would take it
        raise Stopped("stopped while the processes were starting or ending") from None
    if code - EXIT_SIGNAL in STOP_SIGNALS:
        raise KilledError(str(error), code) from None
    failures = [json.loads(path.read_text()) for path in folder.glob("failure_*.json")]
    if not failures:
        raise ProcessFailure(str(error)) from None
    first = min(failures, key=lambda failure: failure["time"])
    kind = LaunchError if first["user_error"] else ProcessFailure
    text = first["text"] if first["user_error"] else f"process {first['rank']}:\n{first['text']}"
    raise kind(text) from None
