from __future__ import annotations

import logging
import sys
import types
from typing import Any

from dn_detr.engine.callbacks import Progress
from dn_detr.engine.schedule import Timetable
from dn_detr.engine.setup import logging_to

RECORD = {
    "iteration": 4, "epoch": 0.5, "loss": 1.25, "grad_norm": 2.0, "lr/default": 1e-4,
    "lr/backbone": 1e-5, "data_time": 0.125, "iter_time": 2.0, "images_per_s": 8.0,
    "memory_mib": 100.0,
}  # fmt: skip


def show(folder, capsys) -> tuple[str, str]:
    """Show one log record; returns what the terminal and the log file got."""
    state: Any = types.SimpleNamespace(iteration=3, timetable=Timetable(8, 10))
    result: Any = None
    progress = Progress()
    with logging_to(folder):
        progress.on_train_start(state)
        state.iteration = 4
        progress.after_step(state, [], result)
        progress.on_log(state, RECORD)
        progress.on_log(state, {"iteration": 4, "eval/AP": 0.5})
        progress.on_train_end(state, failed=False)
    return capsys.readouterr().out, (folder / "log.txt").read_text()


def test_without_a_terminal_the_same_plain_line_goes_to_output_and_log(tmp_path, capsys):
    output, log = show(tmp_path, capsys)
    assert output == log
    assert "iteration 4/10  epoch 0.50  loss 1.2500  grad norm 2  lr 1.0e-04" in log
    assert log.endswith("eta 0:00:12\n")


def test_in_a_terminal_a_bar_replaces_the_line_which_still_goes_to_the_log(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    output, log = show(tmp_path, capsys)
    assert "4/10" in output and "loss 1.2500, lr 1.0e-04, data 0.125 s" in output
    assert "grad norm" not in output and "grad norm 2" in log


def test_no_escape_sequence_of_a_name_reaches_the_terminal_or_the_log(tmp_path, capsys):
    with logging_to(tmp_path):
        logging.getLogger("dn_detr").warning("class %s\nis new", "\x1b]0;evil\x07cat\r")
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert text.endswith("class \\x1b]0;evil\\x07cat\\r\nis new\n")
