"""One process or many: starting them, asking who we are, and exchanging small objects.

A group of processes comes from torchrun, or from `launch` with a number of processes on this
machine. Everything else works the same with and without a group.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .errors import is_user_error, user_message

# Long enough for rank 0 to run COCOeval while the others wait.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """The processes cannot be started as asked, or a started one reported a user's mistake."""


class ProcessFailure(RuntimeError):
    """A started process failed; the message is its traceback."""


def is_distributed() -> bool:
    """Return whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, in [0, world_size)."""
    return dist.get_rank() if is_distributed() else 0


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, >= 1."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if is_distributed():
        dist.barrier()


def all_gather(value: Any) -> list[Any]:
    """Return the picklable `value` of every process, in the order of ranks, to every process."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: statistics of trainable normalisation differ."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def choose_device(name: str) -> torch.device:
    """Return the device of this process and make it the current one.

    Args:
        name: "auto" (CUDA where there is a GPU), "cpu", "cuda" or, in a single process, "cuda:1".

    Raises:
        ValueError: there is no such device.
    """
    device = _parse_device(name)
    if device.type == "cuda":
        _require_gpus(1 if device.index is None else device.index + 1, name)
        if world_size() > 1 and device.index is not None:
            raise LaunchError(f"train.device={name}: several processes need train.device=cuda")
        device = torch.device("cuda", local_rank() if device.index is None else device.index)
        _require_gpus(local_rank() + 1, name)
        torch.cuda.set_device(device)
    return device


def launch(
    function: Callable[..., object],
    num_gpus: int | None = None,
    *args: Any,
    device: str = "auto",
) -> None:
    """Run `function(*args)` in one process, in `num_gpus` processes, or as a part of torchrun's.

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
    """
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        _require_agreement_with_torchrun(num_gpus)
        with _process_group(_parse_device(device).type, "env://"):
            function(*args)
        return
    if num_gpus is not None:
        _require_processes(num_gpus, device)
    if num_gpus is None or num_gpus == 1:
        function(*args)
    else:
        _spawn(function, num_gpus, args, device)


def _parse_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device={name!r}: expected auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"train.device={name!r}: expected auto, cpu, cuda or cuda:0")
    return device


def _require_gpus(count: int, name: str) -> None:
    present = torch.cuda.device_count()
    if count > present:
        raise LaunchError(
            f"train.device={name}: {count} GPU(s) needed, this machine has {present}; "
            "train.device=cpu runs without"
        )


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
        _require_gpus(int(os.environ["LOCAL_RANK"]) + 1, "cuda")
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        device_id=device,
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        yield
    except BaseException:
        # nccl's teardown would wait for processes that are stuck in a collective; they are freed
        # by the end of this one, or by whoever started them
        if not is_cuda:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _spawn(function: Callable[..., object], count: int, args: tuple[Any, ...], device: str) -> None:
    with tempfile.TemporaryDirectory(prefix="dn_detr_launch_") as folder:
        group = multiprocessing.start_processes(
            _run_child,
            args=(count, folder, device, function, args),
            nprocs=count,
            join=False,
            start_method="spawn",
        )
        try:
            while not group.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            _raise_first_failure(Path(folder), error)
        except BaseException:  # an interrupt that only this process got
            for process in group.processes:
                process.terminate()
            raise


def _run_child(
    index: int,
    count: int,
    folder: str,
    device: str,
    function: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    identity = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in identity.items()})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    # A file store needs no free port, so two runs on one machine cannot collide.
    with _process_group(_parse_device(device).type, f"file://{folder}/store"):
        try:
            function(*args)
        except Exception as error:
            # before this process leaves the group, which makes the others fail
            _record_failure(Path(folder), index, error)
            raise


def _record_failure(folder: Path, index: int, error: Exception) -> None:
    user_error = is_user_error(error)
    text = user_message(error) if user_error else traceback.format_exc()
    failure = {"time": time.time(), "rank": index, "user_error": user_error, "text": text}
    (folder / f"failure_{index}.json").write_text(json.dumps(failure), encoding="utf-8")


def _raise_first_failure(folder: Path, error: Exception) -> None:
    """Raise what the first process to fail said: the others fail because it is gone."""
    failures = [json.loads(path.read_text()) for path in folder.glob("failure_*.json")]
    if not failures:
        raise ProcessFailure(str(error)) from None
    first = min(failures, key=lambda failure: failure["time"])
    kind = LaunchError if first["user_error"] else ProcessFailure
    text = first["text"] if first["user_error"] else f"process {first['rank']}:\n{first['text']}"
    raise kind(text) from None
