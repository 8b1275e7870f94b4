"""Kills, full disks and folders that cannot be written to, in real processes."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time

import pytest

from dn_detr.checkpoint import CheckpointError, CheckpointWriter, last_checkpoint, read_manifest
from tests.unprivileged import unprivileged

from .writing import (
    PROCESSES,
    assert_holds,
    fill_the_disk,
    run_processes,
    save_until_killed,
    snapshot,
)

KILLS = 50
SIZE = 200_000  # numbers in each large tensor


@pytest.mark.slow
def test_a_kill_at_any_moment_of_writing_leaves_a_complete_checkpoint(tmp_path, caplog):
    random.seed(0)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(snapshot(1, SIZE))
    hits, iterations = 0, [1]
    for _ in range(KILLS):
        receive, send = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=save_until_killed, args=(send.send, tmp_path, SIZE))
        process.start()
        assert receive.recv() == "started"
        time.sleep(random.uniform(0, 0.3))
        assert process.is_alive()
        process.kill()
        process.join()
        hits += any((tmp_path / "checkpoints").glob(".*"))
        last = last_checkpoint(tmp_path)
        iterations.append(read_manifest(last).iteration)
        assert_holds(last, snapshot(iterations[-1], SIZE))
        best = tmp_path / "checkpoints" / "best"
        if best.exists():
            assert_holds(best, snapshot(read_manifest(best).iteration, SIZE))
    print(f"{KILLS} kills, {hits} while files were written, {iterations[-1]} checkpoints")
    assert caplog.text == ""
    assert iterations == sorted(iterations)
    assert iterations[-1] >= KILLS / 5
    assert hits >= KILLS / 5


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, asynchronous):
    ((message, names, last, latest),) = run_processes(1, fill_the_disk, tmp_path, asynchronous)
    assert re.search(r"checkpoint 0000002 was not saved: .*(File too large|os error 27)", message)
    assert re.search(r"there is space \([0-9]+ MiB free\)", message)
    assert (names, last, latest) == (["0000001", "last"], "0000001", "0000003")
    assert_holds(last_checkpoint(tmp_path), snapshot(3))


def test_a_file_system_without_space_leaves_the_previous_checkpoint(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with CheckpointWriter(tmp_path) as writer:
            writer.save(snapshot(1, size=10_000))
            writer.wait()
            writer.save(snapshot(2, size=50_000))
            with pytest.raises(CheckpointError, match=r"No space left|os error 28"):
                writer.wait()
            assert_holds(last_checkpoint(tmp_path), snapshot(1, size=10_000))
            writer.save(snapshot(3, size=10_000))
            writer.wait()
            assert_holds(last_checkpoint(tmp_path), snapshot(3, size=10_000))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


SAVE_TO_READ_ONLY = """
import sys
from pathlib import Path
from dn_detr.checkpoint import CheckpointError, CheckpointWriter, last_checkpoint
from tests.checkpoint.writing import assert_holds, snapshot

folder = Path(sys.argv[1])
with CheckpointWriter(folder) as writer:
    writer.save(snapshot(1))
    writer.wait()
    (folder / "checkpoints").chmod(0o555)
    writer.save(snapshot(2))
    try:
        writer.wait()
    except CheckpointError as error:
        print(error)
    assert_holds(last_checkpoint(folder), snapshot(1))
    (folder / "checkpoints").chmod(0o755)
    writer.save(snapshot(3))
# not waited for, but not cut off either: the program ends when it is written
unfinished = CheckpointWriter(folder)
unfinished.save(snapshot(4, size=2_000_000))
"""


@pytest.mark.slow
def test_a_read_only_folder_leaves_the_previous_checkpoint_and_an_exit_waits_for_the_disk(tmp_path):
    command = unprivileged(sys.executable, "-c", SAVE_TO_READ_ONLY, str(tmp_path))
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "checkpoint 0000002 was not saved: [Errno 13] Permission denied" in result.stdout
    assert_holds(last_checkpoint(tmp_path), snapshot(4, size=2_000_000))
    assert_holds(tmp_path / "checkpoints" / "0000003", snapshot(3))
