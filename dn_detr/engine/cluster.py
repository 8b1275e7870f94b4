"""Sending a training to a cluster: the resources it asks for, and the submission.

This module needs the extra `slurm` (submitit).
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from dn_detr.errors import UserError

from .cluster_job import ClusterJob, python_command

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


class SubmissionError(UserError):
    """A job cannot be submitted as asked; the message says why and what to change."""


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
        sbatch: further options of sbatch by long name, such as {"partition": "gpu"}.
    """

    minutes: int
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int | None = None
    name: str = "dn_detr"
    save_before: int = 120
    sbatch: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
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

    @property
    def num_processes(self) -> int:
        """Of the whole job."""
        return self.nodes * self.processes_per_node

    def check_device(self, device: str) -> None:
        """Refuse GPUs for a training on CPUs, and the other way round.

        Args:
            device: as `train.device`.

        Raises:
            SubmissionError: they do not go together.
        """
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

    def check_batch_size(self, total: int) -> None:
        """Refuse more processes than a batch has images.

        Args:
            total: images of a batch over all processes, `dataloader.train.total_batch_size`.

        Raises:
            SubmissionError: a process would get none.
        """
        if total < self.num_processes:
            raise SubmissionError(
                f"dataloader.train.total_batch_size={total} leaves some of {self.num_processes} "
                f"processes without an image: set {self.num_processes} or more, or ask for fewer"
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
    numbers = [int(value) for value in match.groups()[1:] if value is not None]
    if match["days"] is not None:
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
    else:
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[
            len(numbers)
        ]
    hours += 24 * int(match["days"] or 0)
    return 60 * hours + minutes - (-seconds // 60)


def submit(
    job: ClusterJob, resources: Resources, folder: str | Path, *, cluster: str = "slurm"
) -> submitit.Job[str]:
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
        return _local_executor(resources, folder).submit(job)
    if shutil.which("sbatch") is None:
        raise SubmissionError(
            "sbatch is not on the PATH: submit from a login node of the cluster, or try "
            "--cluster local on this machine"
        )
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return _slurm_executor(resources, folder).submit(job)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SubmissionError(f"Slurm refused the job: {error}") from error


def _slurm_executor(resources: Resources, folder: str | Path) -> submitit.SlurmExecutor:
    parameters: dict[str, Any] = {
        "job_name": resources.name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.processes_per_node,
        "signal_delay_s": resources.save_before,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **resources.sbatch},
    }
    # One process that fails ends the others, which would wait for it.
    srun_args = ["--kill-on-bad-exit=1"]
    if resources.gpus_per_node:
        parameters["gpus_per_node"] = resources.gpus_per_node
    if resources.cpus_per_process is not None:
        parameters["cpus_per_task"] = resources.cpus_per_process
        # srun does not take it from sbatch since Slurm 22.05
        srun_args.append(f"--cpus-per-task={resources.cpus_per_process}")
    executor = submitit.SlurmExecutor(folder, python=python_command())
    executor.update_parameters(**parameters, srun_args=srun_args)
    return executor


def _local_executor(resources: Resources, folder: str | Path) -> submitit.LocalExecutor:
    if resources.nodes != 1:
        raise SubmissionError(f"--cluster local has one node, not {resources.nodes}")
    executor = submitit.LocalExecutor(folder, python=python_command())
    executor.update_parameters(
        timeout_min=resources.minutes,
        tasks_per_node=resources.processes_per_node,
        gpus_per_node=resources.gpus_per_node,
        signal_delay_s=resources.save_before,
        stderr_to_stdout=True,
    )
    return executor
