"""Starting one process or several, and reporting how they ended.

A group of processes comes from torchrun, from a cluster, or from `launch` with a number of
processes on this machine, which then finds them in the same way.
"""

from __future__ import annotations

import datetime
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from dn_detr.distributed import is_lost_connection
from dn_detr.errors import UserError, user_message
from dn_detr.signals import STOP_SIGNALS, SignalThread
from dn_detr.streams import make_streams_lenient

from .devices import parse_device, require_gpus, use_cores
from .stopping import EXIT_SIGNAL, EXIT_STOPPED, KilledError, Stopped

# Long enough for rank 0 to run COCOeval while the others wait.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# The other ranks have this long to report their own failure before they are terminated.
_FAILURE_GRACE_SECONDS = 5.0


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
    leave the process group of the terminal. From here on no write to stdout or stderr fails.

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
    make_streams_lenient()
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if num_gpus is not None and num_gpus != local_world_size:
            raise LaunchError(
                f"--num-gpus {num_gpus} under torchrun with {local_world_size} processes per node: "
                "drop --num-gpus, torchrun decides"
            )
        with _process_group(device):
            function(*args)
        return
    if num_gpus is not None and num_gpus < 1:
        raise LaunchError(f"--num-gpus {num_gpus}: expected at least 1")
    if num_gpus is not None and device != "cpu" and num_gpus > torch.cuda.device_count():
        raise LaunchError(
            f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()} GPU(s); "
            f"train.device=cpu makes it {num_gpus} CPU process(es)"
        )
    if num_gpus is None or num_gpus == 1:
        function(*args)
    else:
        _start(function, num_gpus, args, device)


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """Join the group that the environment describes; leave it when all went well."""
    rank, local_rank, world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    gpu = torch.device("cuda", local_rank) if parse_device(device).type == "cuda" else None
    if gpu is not None:
        require_gpus(local_rank + 1, "cuda")
        torch.cuda.set_device(gpu)
    store, _, _ = next(iter(rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT)))
    dist.init_process_group(
        "gloo" if gpu is None else "nccl",
        device_id=gpu,
        # torchrun keeps the store when it restarts its processes, which must not find the
        # addresses of the processes before them
        store=dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield
    except BaseException as error:
        # Unless all stop together, nccl's teardown would wait for ranks that are stuck in a
        # collective; they are freed when this process or the one that started it ends.
        if isinstance(error, Stopped) or gpu is None:
            dist.destroy_process_group()
        if is_lost_connection(error):
            raise LaunchError(
                f"rank {rank} lost its connection to another rank, which was killed or failed: see "
                "what that one says; --resume continues from the last checkpoint"
            ) from error
        raise
    dist.destroy_process_group()


def _start(function: Callable[..., object], count: int, args: tuple[Any, ...], device: str) -> None:
    # It inherits what is blocked: a signal to the whole session would end it, and it complains.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reports = multiprocessing.get_context("spawn").SimpleQueue()
    group = multiprocessing.start_processes(
        _run_rank,
        args=(os.getpid(), count, store.port, reports, device, function, args),
        nprocs=count,
        join=False,
        start_method="spawn",
    )

    def pass_on(number: int | None) -> None:
        for process in group.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number or 0)

    failure: ProcessExitedException | ProcessRaisedException | None = None
    with SignalThread(pass_on):
        try:
            while not group.join(grace_period=_FAILURE_GRACE_SECONDS):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            failure = error
    code = getattr(failure, "exit_code", 0)
    if code == EXIT_STOPPED or -code in STOP_SIGNALS:  # there was no training to take the signal
        raise Stopped("stopped while the processes were starting or ending")
    if code - EXIT_SIGNAL in STOP_SIGNALS:
        raise KilledError(str(failure), code)
    # The first report of a failure: the other ranks fail because that one is gone.
    while not reports.empty():
        kind, text = reports.get()
        if failure is None or kind is not Stopped:
            raise kind(text)
    if failure is not None:
        raise ProcessFailure(str(failure))


def _run_rank(
    rank: int,
    parent: int,
    count: int,
    port: int,
    reports: Any,
    device: str,
    function: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    # torch asks for a signal at the parent's death, but only after the imports, which take seconds.
    if os.getppid() != parent:
        raise SystemExit(f"rank {rank} exits: the process that started it is gone")
    os.setpgid(0, 0)  # a terminal signals its whole group, and the parent passes signals on
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent serves the store
    }
    use_cores((os.cpu_count() or 1) // count)
    try:
        with _process_group(device):
            try:
                function(*args)
            except Stopped:
                raise
            # Reported before this rank leaves the group, which makes the others fail.
            except UserError as error:
                reports.put((LaunchError, user_message(error)))
                raise
            except Exception as error:
                if is_lost_connection(error):
                    raise  # the parent knows which rank is gone
                reports.put((ProcessFailure, f"rank {rank}:\n{traceback.format_exc()}"))
                raise
    except Stopped as stop:
        reports.put((Stopped, str(stop)))
