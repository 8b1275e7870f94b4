"""A Slurm cluster of one node on this machine: munged, slurmctld and slurmd, without systemd."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from tests.engine.runs import wait_until

# Where Debian keeps the daemons, which an ordinary PATH does not name.
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts when its old credential is void: after 120 seconds by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
# Jobs take the port of their processes from their number; another cluster may be here as well.
FirstJobId={slurmctld_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldParameters=enable_configless
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A busy machine is slow to start a job, and a limit is one minute at least.
OverTimeLimit=2
MinJobAge=600
# A node that was set down stays so until it is resumed.
ReturnToService=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=lowest Nodes={host} MaxTime=INFINITE PriorityTier=1 GraceTime=0
PartitionName=high Nodes={host} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing_requirement() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "only root can start slurmd"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    return f"Slurm is not installed ({', '.join(absent)})" if absent else None


class SlurmCluster:
    """Starts on `with`, ends all its jobs and daemons at the end of it.

    Args:
        folder: for configuration, state and logs; a short path, because a socket lies there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": f"{folder}/slurm.conf"}
        self.host = socket.gethostname().split(".")[0]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        slurmctld_port, slurmd_port = free_ports(2)

        text = CONFIGURATION.format(
            folder=self.folder,
            host=self.host,
            slurmctld_port=slurmctld_port,
            slurmd_port=slurmd_port,
        )
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_daemons()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The result of a command that sees this cluster."""
        return subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts and ExitCode."""
        result = self.run("scontrol", "--oneliner", "show", "job", job_id)
        pairs = (word.partition("=") for word in result.stdout.split())
        return {key: value for key, _, value in pairs}

    def wait_for(
        self,
        job_id: str,
        condition: Callable[[Mapping[str, str]], bool],
        log: Callable[[], str] = str,
    ) -> dict[str, str]:
        """The job as soon as it is as wanted; `log` grows while there is progress."""

        def is_as_wanted() -> bool:
            time.sleep(0.2)
            return condition(self.job(job_id))

        wait_until(is_as_wanted, log)
        return self.job(job_id)

    def wait_until_ended(self, job_id: str, log: Callable[[], str]) -> dict[str, str]:
        """The job when Slurm is done with it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")
        return self.wait_for(job_id, lambda job: job["JobState"] in ended, log)

    def lose_node(self, job_id: str) -> None:
        """Let the node that runs a job end as by a power cut, be noticed, and come back."""
        slurmd = self._daemons.pop()
        slurmd.kill()
        slurmd.wait()
        _kill(_processes_titled(f"slurmstepd: [{job_id}."))  # before they can report the others
        _kill(self._processes(f"SLURM_JOB_ID={job_id}"))
        node = ("scontrol", "update", f"NodeName={self.host}")
        self.run(*node, "State=DOWN", "Reason=test")
        self.wait_for(job_id, lambda job: job["Restarts"] == "1")
        self._start_node()
        self.run(*node, "State=RESUME")

    def log(self) -> str:
        """What the daemons wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def _start_daemons(self) -> None:
        folder = self.folder
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *munge)
        self._wait_until("munge.socket is there", (folder / "munge.socket").exists)
        self._start("slurmctld", "-D")
        self._start_node()
        is_idle = ("sinfo", "--noheader", "--partition=low", "--format=%T")
        self._wait_until("the node is idle", lambda: self.run(*is_idle).stdout.strip() == "idle")

    def _start_node(self) -> None:
        self._start("slurmd", "-D", "-N", self.host)

    def _start(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=SEARCH_PATH)
        assert program is not None
        with (self.folder / f"{name}.out").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [program, *arguments], env=self.environment, stdout=output, stderr=output
                )
            )

    def _wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            if time.monotonic() > deadline or any(d.poll() is not None for d in self._daemons):
                raise RuntimeError(f"waited in vain until {what}; the daemons say:\n{self.log()}")
            time.sleep(0.1)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill(self._processes())  # jobs outlive the daemons that started them

    def _processes(self, *marks: str) -> list[int]:
        """Everything that this cluster started, known by its environment, with these marks."""
        expected = {f"SLURM_CONF={self.environment['SLURM_CONF']}", *marks}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if expected <= set(path.read_bytes().decode(errors="replace").split("\0")):
                    found.append(int(path.parent.name))
        return found


def _processes_titled(start: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(start.encode()):
                found.append(int(path.parent.name))
    return found


def _kill(process_ids: Iterable[int]) -> None:
    for process_id in process_ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
