"""The allocator's setting, seen in page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from tests.engine.runs import run_python

_FAULTS = """
import resource, torch
from dn_detr.allocator import keep_freed_memory
keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(min(faults() for _ in range(10)))  # small blocks may lie between at first
"""

_KEPT = """
import pathlib, torch
from dn_detr.allocator import keep_freed_memory, release_freed_memory
keep_freed_memory()

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

before = resident()
large = torch.ones(64, 2**20)  # 256 MiB
after = torch.ones(1000)  # lies behind
del large
kept = resident() - before
release_freed_memory()
print(kept, resident() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")


@glibc
def test_large_tensors_fault_once():
    assert int(run_python(_FAULTS, DN_DETR_MALLOC="1").stdout) < 100


@glibc
def test_importing_the_library_changes_no_setting():
    program = _FAULTS.replace("keep_freed_memory()", "import dn_detr.engine, dn_detr.modeling")
    environment = {**os.environ, "DN_DETR_MALLOC": "1"}
    faults = subprocess.check_output([sys.executable, "-c", program], env=environment)
    assert int(faults) > 10_000


@glibc
def test_the_setting_can_be_refused():
    assert int(run_python(_FAULTS, DN_DETR_MALLOC="0").stdout) > 10_000  # pages of 4 KiB


@glibc
def test_what_is_kept_can_be_released():
    kept, left = map(int, run_python(_KEPT, DN_DETR_MALLOC="1").stdout.split())
    assert kept > 200 and left < 50  # MiB


def test_another_choice_is_an_error():
    refused = run_python(_FAULTS, DN_DETR_MALLOC="yes").stderr
    assert "DN_DETR_MALLOC is 'yes'; choose 0 or 1" in refused
