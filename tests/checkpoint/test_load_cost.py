"""Work and memory of loading full checkpoints, as the benchmark measures them."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import load_checkpoint


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_every_layout_loads_within_three_seconds_of_work_and_twice_its_size(tmp_path):
    load_checkpoint.main(["--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) >= 8
    slow = {row["layout"]: row["load_cpu_s"] for row in rows if row["load_cpu_s"] > 3}
    large = {row["layout"]: row["held_over_file"] for row in rows if row["held_over_file"] > 2}
    assert slow == {} and large == {}
