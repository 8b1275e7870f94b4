"""Standard streams whose other end is gone, full or was never there."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from dn_detr.streams import make_streams_lenient
from tools.train_net import main


def a_full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def a_pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("opened", [a_full_disk, a_pipe_without_a_reader])
def test_what_cannot_be_written_is_dropped(opened, monkeypatch):
    stream = os.fdopen(opened(), "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(OSError, match=r"No space|Broken pipe"):
        print("lost", flush=True)
    make_streams_lenient()
    for _ in range(3):
        print("lost", flush=True)
    monkeypatch.undo()
    os.close(stream.fileno())


def test_a_config_that_cannot_be_printed_is_no_success(monkeypatch):
    with os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        with pytest.raises(OSError, match="No space"):
            main(["--config-file", "digits_dn_deformable_detr", "--print-config"])
        monkeypatch.undo()


CLOSED = """
import os, sys
from dn_detr.streams import make_streams_lenient, open_closed_streams, tell
open_closed_streams()
make_streams_lenient()
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
print("for a terminal", flush=True)
print("for a terminal", file=sys.stderr, flush=True)
tell("for a terminal")
assert file > 2 and "torch" not in sys.modules
"""


def test_a_closed_stream_does_not_become_a_file_of_the_run(tmp_path):
    shell = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    command = ["sh", "-c", shell, sys.executable, CLOSED, str(tmp_path / "file")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""
