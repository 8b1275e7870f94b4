"""The command as people and schedulers start it: signals to its processes, and its exit codes."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dn_detr.checkpoint import last_checkpoint
from tests.engine.runs import CONFIG, Group, Run, outcome, wait_until

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [str(ROOT / "tools" / "train_net.py"), "--config-file", CONFIG]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO = ("--num-gpus", "2")
# Long enough to be met in the middle; resumed with the length of the uninterrupted one.
LONG = "train.epochs=100000"
STOPPED = 75

slow = pytest.mark.slow


class Command:
    """The command in a session of its own; a context manager that kills what is left.

    Args:
        folder: `train.output_dir`.
        arguments: of the command.
        launcher: arguments of Python before the command.
        terminal: an open pseudo terminal to be started in, if there is one.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        launcher: Sequence[str] = (),
        terminal: int | None = None,
    ) -> None:
        self.folder = folder
        self._log = folder.with_suffix(".txt")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *COMMAND, f"train.output_dir={folder}",
                 "train.checkpoint.period=1", *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_listen if terminal is None else _take_terminal,
            )  # fmt: skip

    def reach_training(self) -> Command:
        """Return when a checkpoint is written."""
        wait_until(lambda: self._is_saved() or self.process.poll() is not None, lambda: self.log)
        assert self.process.poll() is None, self.log
        return self

    def _is_saved(self) -> bool:
        return (self.folder / "checkpoints" / "last").exists()

    def wait(self) -> int:
        """Return the exit code."""
        wait_until(lambda: self.process.poll() is not None, lambda: self.log)
        return self.process.wait()

    @property
    def log(self) -> str:
        """What all processes have printed."""
        return self._log.read_text()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in _session(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _listen() -> None:
    # A shell script that started these tests in the background would pass on a deaf ear.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _take_terminal() -> None:
    _listen()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _session(leader: int) -> list[int]:
    """Process ids of a session."""
    return list(_commands(leader))


def _commands(leader: int) -> dict[int, str]:
    """Process id -> command line of all that is in a session and has not ended."""
    time.sleep(0.1)  # those who wait ask all the time
    ps = ["ps", "-ww", "-o", "pid=,state=,args=", "-s", str(leader)]
    lines = subprocess.run(ps, capture_output=True, text=True).stdout.splitlines()
    found = [line.split(maxsplit=2) for line in lines]
    return {int(pid): command for pid, state, command in found if state != "Z"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcomes of uninterrupted runs of 1 and 2 processes."""
    folder = tmp_path_factory.mktemp("whole")
    with Run(folder / "one", "train.checkpoint.period=1") as one:
        one.succeed()
    with Group(folder / "two", "train.checkpoint.period=1") as two:
        two.succeed()
    return {1: outcome(folder / "one"), 2: outcome(folder / "two")}


def assert_saved(folder: Path) -> None:
    """The last checkpoint is whole, and a run that is resumed from it goes on."""
    before = last_checkpoint(folder)
    end = int(before.name) + 2
    with Run(folder, "--resume", f"train.max_iter={end}", "train.eval_period=0") as resumed:
        resumed.succeed()
    assert int(last_checkpoint(folder).name) == end


@slow
def test_a_signal_to_all_processes_of_a_job_counts_once(tmp_path):
    options = (*TWO, LONG, "train.checkpoint.period=1", "dataloader.train.num_workers=1")
    with Run(tmp_path / "run", *options) as run:
        wait_until(lambda: last_checkpoint(run.folder) is not None, lambda: run.log)
        processes = _session(run.pid)
        assert len(processes) >= 5  # parent, two ranks, two workers
        for pid in processes:
            os.kill(pid, signal.SIGTERM)
        assert run.wait() == STOPPED
        assert "Traceback" not in run.log
        assert run.log.count("finishing this step") == 1
    assert_saved(tmp_path / "run")


@slow
@pytest.mark.parametrize("what", ["typed", "closed"])
def test_ctrl_c_in_a_terminal_and_its_end_stop_and_save(tmp_path, what):
    keyboard, terminal = pty.openpty()
    with Command(tmp_path / "run", *TWO, LONG, terminal=terminal) as command:
        os.close(terminal)
        command.reach_training()
        if what == "typed":
            os.write(keyboard, b"\x03")
            assert command.wait() == STOPPED
        os.close(keyboard)
        assert command.wait() == STOPPED
        assert "Traceback" not in command.log
        assert ("SIGINT" if what == "typed" else "SIGHUP") in command.log
    assert_saved(tmp_path / "run")


@slow
def test_a_signal_to_the_agent_of_torchrun_lets_its_processes_save(tmp_path):
    with Command(tmp_path / "run", LONG, launcher=TORCHRUN) as command:
        command.reach_training().process.send_signal(signal.SIGTERM)
        assert command.wait() != 0
        assert "(SIGTERM); --resume continues" in command.log
    assert_saved(tmp_path / "run")


@slow
@pytest.mark.parametrize(
    ("processes", "delay", "number"),
    [
        ((), 1.0, signal.SIGTERM),
        ((), 2.0, signal.SIGINT),
        (TWO, 1.0, signal.SIGUSR1),
        (TWO, 4.0, signal.SIGTERM),
    ],
)
def test_a_signal_at_any_time_of_the_start_ends_it_and_breaks_nothing(
    tmp_path, whole, processes, delay, number
):
    with Command(tmp_path / "run", *processes) as command:
        time.sleep(delay)
        command.process.send_signal(number)
        assert command.wait() in (STOPPED, 0), command.log
        assert "Traceback" not in command.log
    with (
        Run(tmp_path / "run", "--resume", "train.checkpoint.period=1")
        if not processes
        else Group(tmp_path / "run", "--resume", "train.checkpoint.period=1") as resumed
    ):
        resumed.succeed()
    assert outcome(tmp_path / "run") == whole[2 if processes else 1]


@slow
def test_processes_whose_parent_is_killed_while_they_import_do_not_train(tmp_path):
    with Command(tmp_path / "run", *TWO, LONG) as command:
        leader = command.process.pid
        wait_until(lambda: sum("spawn_main(" in each for each in _commands(leader).values()) == 2)
        command.process.kill()
        wait_until(lambda: not _session(leader))
        assert "the process that started it is gone" in command.log
    assert not (tmp_path / "run").exists()


@slow
def test_a_second_signal_to_the_parent_ends_its_processes(tmp_path):
    with Run(tmp_path / "run", *TWO, "train.checkpoint.period=1", pause="step 3") as run:
        run.reach_pause()
        wait_until(lambda: last_checkpoint(run.folder) is not None)
        run.signal(signal.SIGTERM)
        time.sleep(1.2)
        run.signal(signal.SIGTERM)
        assert run.wait() == 128 + signal.SIGTERM
        assert "a second signal (SIGTERM)" in run.log
    assert_saved(tmp_path / "run")
