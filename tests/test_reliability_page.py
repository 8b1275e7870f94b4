"""Every promise of tests/README.md names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"\| `pytest ([^`]*)` \|$", PAGE, re.MULTILINE)


def _tests(file: str) -> list[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_promise_has_a_command():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith("| promise |")]
    assert len(promises) == len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_of_a_promise_selects_tests(command):
    files, _, choice = command.partition(" -k ")
    names = [name for file in files.split() for name in _tests(file)]
    assert names
    for word in choice.strip('"').split(" or "):
        assert any(word in name for name in names), word
