from __future__ import annotations

import json
import logging
import signal
import struct
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from dn_detr.engine import RecordWriter
from dn_detr.engine.settings import WandbSettings
from dn_detr.engine.writers import (
    MetricsFile,
    TensorBoard,
    WeightsAndBiases,
    WriterError,
    finite_record,
)

from .runs import run_python

# Runs in a process of its own; arguments: iterations, "limit" to fill the disk, "free" to free it.
DISK_SCRIPT = """
import json, logging, resource, signal, sys, types
from pathlib import Path
from dn_detr.engine.writers import MetricsFile, TensorBoard

logging.basicConfig(format="%(levelname)s %(message)s")
folder, actions = Path(sys.argv[1]), sys.argv[2:]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
state = types.SimpleNamespace(output_dir=folder, iteration=0)
file, board = MetricsFile(folder, 0), TensorBoard()
board.on_train_start(state)
for action in actions:
    if action == "limit":
        size = (folder / "metrics.jsonl").stat().st_size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    elif action == "free":
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    elif action == "kill":
        signal.raise_signal(signal.SIGKILL)
    else:
        record = {"iteration": int(action), "loss": 0.25}
        file.write(record)
        board.on_log(state, record)
print((folder / "metrics.jsonl").read_text(), end="", flush=True)
file.close()
board.on_train_end(state, failed=False)
"""


def state_of(folder: Path, iteration: int = 0) -> Any:
    """As much of the state of a run as a writer asks for."""
    return types.SimpleNamespace(output_dir=folder, iteration=iteration)


def iterations(text: str) -> list[int]:
    return [json.loads(line)["iteration"] for line in text.splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the package logs, also where an earlier run has cut its logger off."""
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)
    return caplog


def test_what_is_not_finite_is_stored_as_null_so_that_every_line_is_json(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.write(
        finite_record({"iteration": 1, "grad_norm": float("inf"), "loss": 1.0, "none": None})
    )
    file.close()
    assert rows(tmp_path) == [{"iteration": 1, "grad_norm": None, "loss": 1.0, "none": None}]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    MetricsFile(tmp_path, 0).close()
    assert rows(tmp_path) == []


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_resuming_drops_later_records_half_written_ones_and_an_evaluation_to_be_repeated(
    tmp_path, is_evaluated
):
    lines = ['{"iteration": 1}', '{"iteration": 2}', '{"iteration": 2, "eval/AP": 0.5}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 3}', '{"iter']))
    MetricsFile(tmp_path, 2, is_evaluated=is_evaluated).close()
    kept = lines if is_evaluated else lines[:2]
    assert rows(tmp_path) == [json.loads(line) for line in kept]


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\x00\x00", b"\xff\xfe{", b"7", b'{"loss": 1.0}', b"[1]", b'{"iteration": "x"}',
        b"[" * 10**5,
    ],
)  # fmt: skip
def test_resuming_drops_what_a_crashed_disk_left_between_the_records(tmp_path, junk):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"iteration": 1}\n' + junk + b"\n")
    file = MetricsFile(tmp_path, 1)
    file.write({"iteration": 2})
    file.close()
    assert rows(tmp_path) == [{"iteration": 1}, {"iteration": 2}]


@pytest.mark.parametrize("left", [b"", b"\x00" * 40 + b"\n"])
def test_records_that_a_power_failure_took_are_told(tmp_path, left, warnings):
    file = MetricsFile(tmp_path, 0)
    for iteration in (1, 2, 3):
        file.write({"iteration": iteration})
    file.write({"iteration": 3, "eval/AP": 0.5})
    file.close()
    assert file.records == 3
    first, *_ = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(first + left)
    resumed = MetricsFile(tmp_path, 3, is_evaluated=True, expected=3)
    assert "lacks 2 of the 3 log records up to iteration 3" in warnings.messages[-1]
    assert resumed.records == 3  # so that every later start tells it too


def test_complete_records_give_no_warning(tmp_path, warnings):
    file = MetricsFile(tmp_path, 0)
    file.write({"iteration": 1})
    file.write({"iteration": 1, "eval/AP": 0.5})  # made again
    file.close()
    MetricsFile(tmp_path, 1, expected=1).close()
    assert warnings.messages == []


@pytest.mark.parametrize("how", ["removed", "renamed", "with its folder"])
def test_a_file_that_disappears_is_an_error_and_later_records_are_in_a_new_one(
    tmp_path, how, warnings
):
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder, 0)
    file.write({"iteration": 1})
    if how == "removed":
        file.path.unlink()
    elif how == "renamed":
        file.path.rename(folder / "mine.jsonl")
    else:
        folder.rename(tmp_path / "mine")
    for iteration in (2, 3):
        file.write({"iteration": iteration})
    file.close()
    assert file.was_removed
    assert [record.levelname for record in warnings.records] == ["ERROR"]
    assert rows(folder) == [{"iteration": 2}, {"iteration": 3}]


def test_a_file_that_cannot_be_written_at_the_start_is_an_error_with_its_path(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(WriterError, match=r"metrics\.jsonl: Is a directory; free disk space"):
        MetricsFile(tmp_path, 0)


def test_tensorboard_gets_the_same_numbers_also_after_a_rollback(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, state = TensorBoard(), state_of(tmp_path)
    board.on_train_start(state)
    for iteration, loss in ((2, 2.0), (4, 9.0), (6, 9.0), (4, 1.5)):
        board.on_log(state, {"iteration": iteration, "loss": loss, "grad_norm": None})
    board.on_train_end(state, failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 2.0), (4, 1.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_a_tensorboard_that_cannot_start_is_a_warning(tmp_path, warnings):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    board, state = TensorBoard(), state_of(tmp_path)
    board.on_train_start(state)
    board.on_log(state, {"iteration": 1})
    board.on_train_end(state, failed=False)
    assert "TensorBoard failed and is switched off" in warnings.text
    assert len(warnings.records) == 1


def test_a_tensorboard_whose_folder_is_renamed_is_one_warning(tmp_path, warnings, monkeypatch):
    of_thread: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", of_thread.append)
    (tmp_path / "run").mkdir()
    board, state = TensorBoard(), state_of(tmp_path / "run")
    board.on_train_start(state)
    board.on_log(state, {"iteration": 1, "loss": 1.0})
    time.sleep(0.5)  # its thread has written
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for iteration in range(2, 4):
        board.on_log(state, {"iteration": iteration, "loss": 1.0})
    board.on_train_end(state, failed=False)
    time.sleep(0.5)
    assert "TensorBoard failed and is switched off" in warnings.text
    assert len(warnings.records) == 1 and not of_thread


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory):
    """A process that writes four records, the middle two on a full disk."""
    folder = tmp_path_factory.mktemp("full_disk")
    done = run_python(DISK_SCRIPT, folder, 1, "limit", 2, 3, "free", 4)
    return folder, done


@pytest.mark.slow
def test_records_that_met_a_full_disk_are_written_when_there_is_room(full_disk):
    folder, done = full_disk
    assert done.returncode == 0, done.stderr
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_its_end_one_warning(full_disk):
    log = full_disk[1].stderr
    assert log.count("metrics.jsonl cannot be written: File too large; training goes on") == 1
    assert log.count("metrics.jsonl is complete again") == 1


@pytest.mark.slow
def test_a_tensorboard_that_met_a_full_disk_is_switched_off_with_one_warning(full_disk):
    assert full_disk[1].stderr.count("TensorBoard failed and is switched off") == 1


@pytest.mark.slow
def test_a_run_that_ends_or_is_killed_on_a_full_disk_leaves_whole_lines(tmp_path):
    (ended := tmp_path / "ended").mkdir()
    (killed := tmp_path / "killed").mkdir()
    done = run_python(DISK_SCRIPT, ended, 1, "limit", 2, 3)
    assert done.returncode == 0 and iterations(done.stdout) == [1]
    assert "metrics.jsonl lacks the last 2 log records" in done.stderr
    assert run_python(DISK_SCRIPT, killed, 1, "limit", 2, "kill").returncode == -signal.SIGKILL
    assert rows(ended) == rows(killed) == [{"iteration": 1, "loss": 0.25}]


class FailingWriter(RecordWriter):
    """A writer of a user's own with a bug."""

    def open(self, state):
        pass

    def write(self, record):
        raise KeyError("a bug")

    def close(self, *, failed):
        raise OSError("another one")


def test_a_writer_that_fails_costs_one_warning(tmp_path, warnings):
    writer, state = FailingWriter(), state_of(tmp_path)
    writer.on_train_start(state)
    for iteration in (1, 2):
        writer.on_log(state, {"iteration": iteration})
    writer.on_train_end(state, failed=False)
    assert [record.getMessage() for record in warnings.records] == [
        "FailingWriter failed and is switched off, metrics.jsonl has all log records: "
        "KeyError: 'a bug'"
    ]


def test_a_writer_that_does_not_close_is_a_warning(tmp_path, warnings):
    writer, state = FailingWriter(), state_of(tmp_path)
    writer.on_train_start(state)
    writer.on_train_end(state, failed=False)
    assert warnings.messages == ["FailingWriter did not close: OSError: another one"]


def test_weights_and_biases_without_its_package_is_an_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import finds where it is missing
    with pytest.raises(WriterError, match=r"pip install 'dn_detr\[wandb\]'"):
        WeightsAndBiases(WandbSettings(enabled=True), {}).on_train_start(state_of(tmp_path))


WANDB_SCRIPT = """
import logging, os, signal, subprocess, sys, time, types
from pathlib import Path
from dn_detr.engine.settings import WandbSettings
from dn_detr.engine.writers import MetricsFile, WeightsAndBiases, finite_record

def kill_service():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            is_service = parent == os.getpid() and "wandb" in (process / "cmdline").read_text()
        except OSError:
            continue  # it has ended meanwhile
        if is_service:
            os.kill(int(process.name), signal.SIGKILL)
            print("killed the service", flush=True)

logging.basicConfig(format="%(levelname)s %(message)s")
folder, start, *actions = sys.argv[1:]
settings = WandbSettings(enabled=True, name="a name")
state = types.SimpleNamespace(output_dir=Path(folder), iteration=int(start))
file, writer = MetricsFile(Path(folder), int(start)), WeightsAndBiases(settings, {"seed": 7})
failed = True
try:
    writer.on_train_start(state)
    for action in actions:
        if action == "kill":
            kill_service()
            time.sleep(0.5)
        elif action == "fail":
            raise RuntimeError("on purpose")
        else:
            record = {"iteration": int(action), "loss": 0.25, "grad_norm": float("nan")}
            file.write(finite_record(record))
            writer.on_log(state, finite_record(record))
    failed = False
finally:
    writer.on_train_end(state, failed=failed)
    file.close()
"""


@pytest.fixture(scope="module")
def run_wandb(tmp_path_factory):
    pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("home")  # without anybody's login

    def run(*arguments: object, mode: str = "offline") -> Any:
        environment = {"HOME": str(home), "WANDB_MODE": mode, "WANDB_API_KEY": ""}
        return run_python(WANDB_SCRIPT, *arguments, **environment)

    return run


def wandb_records(folder: Path) -> list[list[Any]]:
    """The records of every offline run in a folder, oldest first, read from wandb's own file.

    Its format is LevelDB's log: blocks of 32 KiB with records (checksum, length, kind).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, position, part, records = file.read_bytes(), 7, b"", []
        while position + 7 <= len(content):
            _, length, kind = struct.unpack_from("<IHB", content, position)
            part += content[position + 7 : position + 7 + length]
            position += 7 + length
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
            if kind in (1, 4):  # a whole record, or the last part of one
                records.append(Record.FromString(part))
                part = b""
        runs.append(records)
    return runs


def history(records: list[Any]) -> list[dict[str, float]]:
    found = [record.history.item for record in records if record.HasField("history")]
    values = [
        {i.nested_key[0] or i.key: json.loads(i.value_json) for i in items} for items in found
    ]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in values]


@pytest.fixture(scope="module")
def resumed_wandb(run_wandb, tmp_path_factory):
    """A run that fails after three records, and one that resumes it after the second."""
    folder = tmp_path_factory.mktemp("wandb")
    first = run_wandb(folder, 0, 1, 2, 3, "fail")
    second = run_wandb(folder, 2, 3, 4)
    assert (first.returncode, second.returncode) == (1, 0), first.stderr + second.stderr
    return folder, wandb_records(folder)


@pytest.mark.slow
def test_weights_and_biases_gets_the_finite_numbers_without_a_network(resumed_wandb):
    _, (first, _) = resumed_wandb
    assert history(first) == [{"iteration": i, "loss": 0.25} for i in (1, 2, 3)]


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_run_of_weights_and_biases(resumed_wandb):
    folder, (first, second) = resumed_wandb
    ids = [r.run.run_id for records in (first, second) for r in records if r.HasField("run")]
    assert len(set(ids)) == 1 and ids[0] == (folder / "wandb_run_id.txt").read_text().strip()
    assert [row["iteration"] for row in history(second)] == [3, 4]


@pytest.mark.slow
def test_weights_and_biases_plots_over_the_iteration(resumed_wandb):
    _, (first, _) = resumed_wandb
    metrics = [record.metric for record in first if record.HasField("metric")]
    assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["iteration"]


@pytest.mark.slow
def test_weights_and_biases_shows_a_run_that_failed_as_failed(resumed_wandb):
    _, runs = resumed_wandb
    codes = [r.exit.exit_code for records in runs for r in records if r.HasField("exit")]
    assert codes == [1, 0]


@pytest.mark.slow
def test_training_outlives_the_service_of_weights_and_biases(run_wandb, tmp_path):
    done = run_wandb(tmp_path, 0, 1, "kill", 2, 3)
    assert done.returncode == 0 and "killed the service" in done.stdout, done.stderr
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3]
    assert done.stderr.count("WeightsAndBiases failed and is switched off") == 1


@pytest.mark.slow
def test_a_new_run_that_is_not_logged_in_is_an_error_and_a_resumed_one_goes_on(run_wandb, tmp_path):
    new = run_wandb(tmp_path, 0, 1, mode="online")
    assert new.returncode == 1
    assert "WriterError: Weights & Biases does not start; `wandb login`" in new.stderr
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    resumed = run_wandb(tmp_path, 1, 2, mode="online")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("WeightsAndBiases failed and is switched off") == 1
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2]
