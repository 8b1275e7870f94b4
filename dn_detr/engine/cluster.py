"""Training on a Slurm cluster: what to ask for, the submission, and the job itself.

submitit starts one process for each GPU, which unpickles a `ClusterJob` and calls it, and queues
the job again where `ClusterJob.checkpoint` says so. This module needs the extra `slurm`.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from dn_detr.errors import UserError
from dn_detr.signals import EXIT_STOPPED, STOP_SIGNALS

from .devices import use_cores

# Below the ports that Linux gives to outgoing connections (32768 and more).
_FIRST_PORT, _PORTS = 20000, 12000
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
# How submitit starts Python: with STOP_SIGNALS blocked, so that one during the imports, which take
# seconds, waits for the training.
_BLOCKED = f"signal.pthread_sigmask(signal.SIG_BLOCK, {[int(number) for number in STOP_SIGNALS]})"
_START = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
PYTHON_COMMAND = shlex.join([sys.executable, "-c", f"import os, signal, sys; {_BLOCKED}; {_START}"])


class SubmissionError(UserError):
    """A job cannot be submitted as asked; the message says why and what to change."""


@dataclass(frozen=True)
class ClusterJob:
    """One process of a training on a cluster.

    Attributes:
        script: path of tools/train_net.py, whose `main` takes arguments and returns an exit code.
        arguments: of `script`, without `--resume`, which is always added: a first start finds
            nothing to resume and starts a new run.
    """

    script: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Train until the end, or until the time limit or a preemption stops it.

        Raises:
            SystemExit: the training failed, or stopped.
        """
        job = submitit.JobEnvironment()
        os.environ.update(distributed_environment(job))
        share = (os.cpu_count() or 1) * job.num_nodes // job.num_tasks
        use_cores(int(os.environ.get("SLURM_CPUS_PER_TASK", share)))
        code = runpy.run_path(self.script)["main"]([*self.arguments, "--resume"])
        if code == EXIT_STOPPED and job.global_rank != 0:
            return  # not a failure, which would end the main process: it queues the job again
        if code == EXIT_STOPPED and job.cluster == "slurm":
            # to submitit's handler, which asks `checkpoint` and exits
            signal.raise_signal(getattr(signal, f"SIG{job.USR_SIG}"))
        if code:
            # srun ends the other ranks when one has failed; their exit code is to stay the error's
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(code)

    def checkpoint(self) -> DelayedSubmission | None:
        """Say whether the main process queues this job again; submitit asks.

        It does if Slurm calls the job RUNNING (its time limit is near, a preemption gives it grace
        time, or somebody sent the signal alone), or ended it at its time limit. A cancelled job is
        not RUNNING any more, and Slurm itself queues one that is preempted without grace time. One
        that has more restarts than this process was started again already: its node failed, and
        Slurm did not wait for this process.
        """
        job_id = submitit.JobEnvironment().raw_job_id
        words = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job_id],
            check=True, stdout=subprocess.PIPE, text=True, timeout=60,
        ).stdout.split()  # fmt: skip
        job = {key: value for key, _, value in (word.partition("=") for word in words)}
        # A job that is being sent the signal may be called SIGNALING for a moment.
        goes_on = job["JobState"] in ("RUNNING", "SIGNALING") or job["Reason"] == "TimeLimit"
        is_latest = job["Restarts"] == os.environ.get("SLURM_RESTART_COUNT", "0")
        return DelayedSubmission(self) if goes_on and is_latest else None


def distributed_environment(job: submitit.JobEnvironment) -> dict[str, str]:
    """Return the variables by which torch.distributed finds the processes of the job.

    The port follows from the number of the job, so that all processes know it and jobs that share
    a node do not collide. MASTER_PORT and MASTER_ADDR, set at submission, have priority.
    """
    address = "127.0.0.1" if job.num_nodes == 1 else job.hostnames[0]
    port = _FIRST_PORT + int(job.raw_job_id) % _PORTS
    return {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
    }


@dataclass(frozen=True)
class Resources:
    """What a job asks its cluster for.

    Attributes:
        minutes: time limit.
        nodes: number of machines.
        processes_per_node: one for each GPU, or any number without GPUs.
        gpus_per_node: `processes_per_node`, or 0 for a training on CPUs.
        cpus_per_process: cores of each process; None: what the cluster gives.
        name: of the job.
        save_before: seconds between the request to save and the time limit.
        max_requeues: how often the job starts again after its time limit.
        sbatch: further options of sbatch by long name, such as {"partition": "gpu"}.
    """

    minutes: int
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int | None = None
    name: str = "dn_detr"
    save_before: int = 120
    max_requeues: int = 100
    sbatch: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_processes(self) -> int:
        """Of the whole job."""
        return self.nodes * self.processes_per_node

    def check(self, device: str, total_batch_size: int | None) -> None:
        """Refuse what cannot be, or does not go with a config.

        Args:
            device: `train.device`.
            total_batch_size: images of a batch over all processes; None: unknown.

        Raises:
            SubmissionError: a number is too small, GPUs are asked for a training on CPUs or the
                other way round, or a process would get no image.
        """
        positive = ("minutes", "nodes", "processes_per_node", "cpus_per_process", "save_before")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SubmissionError(f"{name.replace('_', ' ')}: {value}; expected at least 1")
        if self.save_before >= 60 * self.minutes:
            raise SubmissionError(
                f"a time limit of {self.minutes} min leaves nothing to train when the run is asked "
                f"to save {self.save_before} s before it: ask for more time, or save later"
            )
        if self.gpus_per_node and device == "cpu":
            raise SubmissionError(
                "train.device=cpu uses no GPUs: ask for --processes-per-node instead of "
                "--gpus-per-node"
            )
        if not self.gpus_per_node and device != "cpu":
            raise SubmissionError(
                f"train.device={device} needs GPUs: ask for --gpus-per-node, or train with "
                "train.device=cpu"
            )
        if total_batch_size is not None and total_batch_size < self.num_processes:
            raise SubmissionError(
                f"dataloader.train.total_batch_size={total_batch_size} leaves some of "
                f"{self.num_processes} processes without an image: set {self.num_processes} or "
                "more, or ask for fewer"
            )


def parse_minutes(text: str) -> int:
    """Return the minutes of a time limit as sbatch writes it, rounded up.

    Args:
        text: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours",
            "days-hours:minutes" or "days-hours:minutes:seconds".

    Raises:
        SubmissionError: it is none of these.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise SubmissionError(
            f"time limit {text!r}: expected minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds, such as 90, 24:00:00 or 2-12:00:00"
        )
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is None and len(numbers) < 3:
        numbers.insert(0, 0)  # without days, one number or two begin with the minutes
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    hours += 24 * int(match["days"] or 0)
    return 60 * hours + minutes - (-seconds // 60)


def submit(
    job: ClusterJob, resources: Resources, folder: str | Path, *, cluster: str = "slurm"
) -> submitit.Job[None]:
    """Queue a training.

    Args:
        job: what every process runs.
        resources: what to ask for.
        folder: for submitit's files and the logs; on a file system that the nodes share.
        cluster: "slurm", or "local" for processes on this machine, without a queue.

    Raises:
        SubmissionError: Slurm is not there, or refuses.
    """
    if cluster == "local":
        if resources.nodes != 1:
            raise SubmissionError(f"--cluster local has one node, not {resources.nodes}")
        here = submitit.LocalExecutor(folder, python=PYTHON_COMMAND)
        here.update_parameters(
            timeout_min=resources.minutes,
            tasks_per_node=resources.processes_per_node,
            gpus_per_node=resources.gpus_per_node,
            signal_delay_s=resources.save_before,
            stderr_to_stdout=True,
        )
        return here.submit(job)
    if shutil.which("sbatch") is None:
        raise SubmissionError(
            "sbatch is not on the PATH: submit from a login node of the cluster, or try "
            "--cluster local on this machine"
        )
    parameters: dict[str, Any] = {
        "job_name": resources.name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes_per_node,
        "signal_delay_s": resources.save_before,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **resources.sbatch},
        # A process that fails ends the others, which would wait for it.
        "srun_args": ["--kill-on-bad-exit=1"],
    }
    if resources.gpus_per_node:
        parameters["gpus_per_node"] = resources.gpus_per_node
    if resources.cpus_per_process is not None:
        parameters["cpus_per_task"] = resources.cpus_per_process
        # srun does not take it from sbatch since Slurm 22.05
        parameters["srun_args"].append(f"--cpus-per-task={resources.cpus_per_process}")
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            executor = submitit.SlurmExecutor(
                folder, max_num_timeout=resources.max_requeues, python=PYTHON_COMMAND
            )
            executor.update_parameters(**parameters)
            return executor.submit(job)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SubmissionError(f"Slurm refused the job: {error}") from error
