from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from dn_detr.engine import evaluate, setup
from dn_detr.engine.setup import lock_folder, make_folder
from dn_detr.errors import UserError


def hold(folder, is_held) -> None:
    with lock_folder(folder):
        is_held.set()
        time.sleep(60)


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the folder."""
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, is_held))
    process.start()
    assert is_held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_run_in_the_same_folder_is_refused_and_told_which_is_the_first(
    tmp_path, other_run, monkeypatch
):
    monkeypatch.setattr(setup, "_LOCK_SECONDS", 0.3)
    message = f"another run is writing there .process {other_run.pid} on"
    with pytest.raises(ValueError, match=message), lock_folder(tmp_path):
        pass


def test_a_run_that_was_killed_holds_nothing(tmp_path, other_run):
    os.kill(other_run.pid, signal.SIGKILL)
    with lock_folder(tmp_path):
        pass


def test_runs_may_follow_each_other(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path):
            pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/run", "train.output_dir=s3://bucket/run: expected a folder of its own"),
        ("/", "train.output_dir=/: expected a folder of its own"),
        ("{tmp_path}/" + 300 * "x", "cannot be created: .*File name too long"),
        ("{tmp_path}/file", "cannot be created: .*File exists"),
    ],
)
def test_what_cannot_be_the_folder_of_a_run_is_refused(tmp_path, monkeypatch, path, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        make_folder(path.format(tmp_path=tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert make_folder(".").is_dir()


def test_an_evaluation_in_the_folder_of_a_running_training_is_refused(
    tmp_path, other_run, monkeypatch, tiny_config
):
    monkeypatch.setattr(setup, "_LOCK_SECONDS", 0.3)
    with pytest.raises(UserError, match="another run is writing there"):
        evaluate(tiny_config(f"train.output_dir={tmp_path}", "train.init_checkpoint=x"))
    assert not (tmp_path / "eval").exists()
