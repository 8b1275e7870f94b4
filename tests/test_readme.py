"""The Python of the README and of the operators' page runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def _blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_python_of_the_operators_page_attends():
    (block,) = _blocks("docs/operators.md")
    names: dict[str, object] = {}
    exec(block, names)
    assert names["out"].shape == (1, 100, 256)


def test_python_of_the_readme_detects_in_a_photo(tmp_path, monkeypatch):
    blocks = _blocks("README.md")
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (160, 60), "red").save("photo.jpg")
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    found = names["found"]
    assert found.image_size == (60, 160) and len(found.scores) == 300
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
