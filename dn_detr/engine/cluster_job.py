"""What a job of a cluster does: join the other processes, train, and queue itself again.

Slurm starts one process for each GPU; submitit unpickles a `ClusterJob` there and calls it. This
module needs the extra `slurm` (submitit).
"""

from __future__ import annotations

import logging
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import submitit
import torch
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from .stopping import EXIT_STOPPED, STOP_SIGNALS

# Below the ports that Linux gives to outgoing connections (32768 and more).
_FIRST_PORT, _PORTS = 20000, 12000
# submitit starts a local job so long before `ClusterJob` at most, because importing takes time.
_START_SECONDS = 60

# A job that is being sent the signal before its time limit may be called SIGNALING for a moment.
_RUNNING = ("RUNNING", "SIGNALING")

logger = logging.getLogger("submitit")  # the job's own log


@dataclass(frozen=True)
class ClusterJob:
    """One process of a training on a cluster.

    Attributes:
        script: path of tools/train_net.py, whose `main` takes arguments and returns an exit code.
        arguments: of `script`, without `--resume`, which is always added: a first start finds
            nothing to resume and starts a new run.
        max_requeues: how often the job may start again.
    """

    script: str
    arguments: tuple[str, ...]
    max_requeues: int

    def __call__(self) -> str:
        """Train until the end, or until the time limit or a preemption stops it.

        Returns:
            "finished", or "stopped" where another process decides on what comes next.

        Raises:
            SystemExit: the training failed, or stopped and this process decides.
        """
        started = time.monotonic()
        job = submitit.JobEnvironment()
        os.environ.update(distributed_environment(job))
        set_number_of_threads(job)
        with signals_held():
            code = runpy.run_path(self.script)["main"]([*self.arguments, "--resume"])
            if code == 0:
                return "finished"
            if code != EXIT_STOPPED:
                raise SystemExit(code)
            if job.global_rank != 0:
                return "stopped"
            if job.cluster == "slurm":
                requeue(job.raw_job_id, self.max_requeues)
            elif _is_local_time_out(time.monotonic() - started):
                raise SystemExit(LOCAL_REQUEUE_RETURN_CODE)  # submitit starts the job again
            raise SystemExit(EXIT_STOPPED)


def distributed_environment(job: submitit.JobEnvironment) -> dict[str, str]:
    """Return the variables by which torch.distributed finds the processes of the job.

    The port follows from the number of the job, so that all processes know it and jobs that share
    a node do not collide. MASTER_PORT and MASTER_ADDR, set at submission, have priority.
    """
    is_one_node = job.num_nodes == 1
    port = _FIRST_PORT + int(job.raw_job_id) % _PORTS
    return {
        "MASTER_ADDR": os.environ.get(
            "MASTER_ADDR", "127.0.0.1" if is_one_node else job.hostnames[0]
        ),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
    }


def set_number_of_threads(job: submitit.JobEnvironment) -> None:
    """Share the node's cores among its processes, unless OMP_NUM_THREADS says how."""
    if "OMP_NUM_THREADS" not in os.environ:
        share = (os.cpu_count() or 1) * job.num_nodes // job.num_tasks
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", max(1, share))))


def python_command() -> str:
    """Return the shell command by which submitit starts Python: with `STOP_SIGNALS` blocked.

    A signal that comes during the imports, which take seconds, then waits for `signals_held`; it
    would end the process otherwise.
    """
    block = f"signal.pthread_sigmask(signal.SIG_BLOCK, {[int(each) for each in STOP_SIGNALS]})"
    start = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return shlex.join([sys.executable, "-c", f"import os, signal, sys; {block}; {start}"])


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep signals that ask to stop until the training listens, and hand them over then.

    They must not reach submitit's handlers, which queue the job again and exit in the middle of
    whatever is going on. Afterwards these signals are ignored: the process is about to end.
    """
    held: list[int] = []
    is_over = threading.Event()

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    def hand_over() -> None:
        while not is_over.wait(0.1):
            if held and signal.getsignal(held[0]) is not hold:
                os.kill(os.getpid(), held.pop(0))

    for number in STOP_SIGNALS:
        signal.signal(number, hold)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=hand_over, name="held signals", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def requeue(job_id: str, max_requeues: int) -> bool:
    """Queue this Slurm job again, unless Slurm has decided already.

    Queued again is a job that Slurm calls RUNNING (its time limit is near, a preemption gives it
    grace time, or somebody sent the signal alone), and one that was ended by its time limit. One
    that was cancelled is no longer RUNNING when its processes get the signal, and one that is
    preempted without grace time is queued again by Slurm.

    Args:
        job_id: number of the job.
        max_requeues: how often it may start again; Slurm's own restarts (preemption, failed
            nodes) count as well.

    Returns:
        Whether it was queued.
    """
    job = _job_fields(job_id)
    if job["JobState"] not in _RUNNING and job["Reason"] != "TimeLimit":
        logger.info("job %s is %s: whether it starts again is up to Slurm", job_id, job["JobState"])
        return False
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if int(job["Restarts"]) > restarts:  # a node failed, and Slurm did not wait for this process
        logger.info("job %s has started again already", job_id)
        return False
    if restarts >= max_requeues:
        logger.error(
            "job %s was started again %d times, as often as --max-requeues allows; submit the same "
            "command to continue", job_id, restarts,
        )  # fmt: skip
        return False
    _scontrol("requeue", job_id)
    logger.info("job %s is queued again (%d of %d)", job_id, restarts + 1, max_requeues)
    return True


def _job_fields(job_id: str) -> dict[str, str]:
    words = _scontrol("--oneliner", "show", "job", job_id).split()
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def _scontrol(*arguments: str) -> str:
    result = subprocess.run(
        ["scontrol", *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    return result.stdout


def _is_local_time_out(seconds: float) -> bool:
    """Whether submitit's warning stopped a local job, and not somebody who wants it to end."""
    limit = int(os.environ["SUBMITIT_LOCAL_TIMEOUT_S"])
    return seconds > limit - int(os.environ["SUBMITIT_LOCAL_SIGNAL_DELAY_S"]) - _START_SECONDS
