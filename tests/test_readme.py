"""The Python of the README and of the operators' page runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from PIL import Image

from dn_detr.checkpoint import save_weights
from dn_detr.config import LazyConfig, get_config, instantiate

ROOT = Path(__file__).resolve().parents[1]


def _names_after(page: str) -> dict[str, Any]:
    """Run the Python blocks of a page; return what they define."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    return names


def test_python_of_the_operators_page_attends():
    assert _names_after("docs/operators.md")["out"].shape == (1, 100, 256)


def test_python_of_the_readme_detects_in_a_photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = get_config("digits_dn_deformable_detr")
    state = instantiate(cfg.model).state_dict()
    checkpoints = Path("output/run1/checkpoints")
    checkpoints.mkdir(parents=True)
    config = LazyConfig.to_yaml(cfg)
    save_weights(checkpoints / "0000001", state, config=config, class_names=list("0123456789"))
    (checkpoints / "last").symlink_to("0000001")
    Image.new("RGB", (160, 60), "red").save("photo.jpg")
    found = _names_after("README.md")["found"]
    assert found.image_size == (60, 160) and (found.scores >= 0.4).all()
