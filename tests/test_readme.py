"""The Python of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_of_the_readme_detects_in_a_photo(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (160, 60), "red").save("photo.jpg")
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    found = names["found"]
    assert found.image_size == (60, 160) and len(found.scores) == 300
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
