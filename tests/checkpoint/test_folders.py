"""Folders beside the checkpoints of a run, and removed or moved ones, are handled as expected."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dn_detr.checkpoint import CheckpointError, CheckpointWriter, last_checkpoint
from dn_detr.checkpoint import manifest as manifest_module
from tests.unprivileged import unprivileged

from .writing import assert_holds, snapshot


def save(output_dir: Path, *iterations: int, keep: int | None = None) -> Path:
    with CheckpointWriter(output_dir, keep=keep) as writer:
        for iteration in iterations:
            writer.save(snapshot(iteration))
        writer.wait()
    return output_dir / "checkpoints"


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def test_folders_of_others_stay(tmp_path):
    checkpoints = save(tmp_path, 1)
    (checkpoints / "2023").mkdir()
    shutil.copytree(checkpoints / "0000001", checkpoints / "20241125")
    save(tmp_path, 2, 3, keep=1)
    assert names(checkpoints) == ["0000003", "2023", "20241125", "last"]
    assert_holds(last_checkpoint(tmp_path), snapshot(3))


def test_the_abandoned_future_is_removed_loudly(tmp_path, caplog):
    checkpoints = save(tmp_path, 1, 9)
    save(tmp_path, 2, keep=3)
    assert names(checkpoints) == ["0000001", "0000002", "last"]
    assert f"removing {checkpoints / '0000009'}" in caplog.text


def test_a_run_that_was_copied_without_its_links_goes_on(tmp_path):
    with CheckpointWriter(tmp_path / "run") as writer:
        writer.save(snapshot(1))
        writer.record_evaluation(1, {}, is_best=True)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # of what the links point at
    with CheckpointWriter(tmp_path / "copy") as writer:
        writer.save(snapshot(2))
        writer.record_evaluation(2, {}, is_best=True)
        writer.wait()
    checkpoints = tmp_path / "copy" / "checkpoints"
    assert names(checkpoints) == ["0000001", "0000002", "best", "last"]
    assert (checkpoints / "best").readlink() == (checkpoints / "last").readlink() == Path("0000002")


def newer(checkpoint: Path) -> None:
    """Let it look as if a later version had written it."""
    content = json.loads((checkpoint / "manifest.json").read_text())
    del content["sha256"]
    content["format_version"] = 99
    content["sha256"] = manifest_module._digest_of_content(content)
    (checkpoint / "manifest.json").write_text(json.dumps(content, indent=1))


def test_one_of_a_newer_version_is_not_replaced_by_one_before_it(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    newer(checkpoints / "0000002")
    with pytest.raises(CheckpointError, match=r"newer dn_detr.* or move .*0000002 away"):
        last_checkpoint(tmp_path)
    (checkpoints / "0000002").rename(tmp_path / "elsewhere")
    assert_holds(last_checkpoint(tmp_path), snapshot(1))


FIND_LAST = """
import sys
from dn_detr.checkpoint import last_checkpoint
last_checkpoint(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_one_that_may_not_be_read_is_not_replaced_by_one_before_it(tmp_path, file):
    path = save(tmp_path, 1, 2) / "0000002" / file
    path.chmod(0)
    command = unprivileged(sys.executable, "-c", FIND_LAST, str(tmp_path))
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"UnreadableError: {path}: no permission to read it" in found.stderr


SAVE_MORE = """
import sys
from dn_detr.checkpoint import CheckpointWriter
from tests.checkpoint.writing import snapshot
with CheckpointWriter(sys.argv[1], keep=1) as writer:
    for iteration in (2, 3):
        writer.save(snapshot(iteration))
        writer.wait()
"""


@pytest.mark.slow
def test_a_checkpoint_that_is_write_protected_stays_and_stops_nothing(tmp_path):
    checkpoints = save(tmp_path, 1)
    (checkpoints / "0000001").chmod(0o555)
    command = unprivileged(sys.executable, "-c", SAVE_MORE, str(tmp_path))
    saved = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert saved.returncode == 0, saved.stderr
    assert names(checkpoints) == ["0000001", "0000003", "last"]
    assert_holds(checkpoints / "0000001", snapshot(1))


def test_what_cannot_be_removed_stops_nothing(tmp_path, caplog):
    checkpoints = save(tmp_path, 1)
    immutable = checkpoints / "0000001" / "model.safetensors"
    if (
        shutil.which("chattr") is None
        or subprocess.run(["chattr", "+i", str(immutable)]).returncode
    ):
        pytest.skip("only root can let a file resist removal, on some file systems")
    try:
        save(tmp_path, 2, 3, keep=1)
    finally:
        (left,) = checkpoints.glob("*0000001*/model.safetensors")
        subprocess.run(["chattr", "-i", str(left)], check=True)
    assert "cannot be removed" in caplog.text
    assert_holds(last_checkpoint(tmp_path), snapshot(3))
    save(tmp_path, 4, keep=1)
    assert names(checkpoints) == ["0000004", "last"]


@pytest.mark.parametrize("obstacle", ["file", "dangling link"])
def test_a_folder_that_cannot_take_checkpoints_is_refused(tmp_path, obstacle):
    checkpoints = tmp_path / "checkpoints"
    if obstacle == "file":
        checkpoints.touch()
    else:
        checkpoints.symlink_to(tmp_path / "unmounted")
    with CheckpointWriter(tmp_path) as writer, pytest.raises(CheckpointError, match="cannot be wr"):
        writer.require_writable()


def test_a_folder_that_can_take_checkpoints_is_left_as_it_is(tmp_path):
    with CheckpointWriter(tmp_path) as writer:
        writer.require_writable()
    assert names(tmp_path / "checkpoints") == []
