"""The pictures of the page about denoising."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tools import make_denoising_pictures

ROWS = [
    {"detector": name, "denoising": denoising, "AP": [10.0, 20.0 + denoising]}
    for name in ("DETR", "DINO", "Faster R-CNN", "DAB-DETR")
    for denoising in (False, True)
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("pictures")
    study = folder / "study.json"
    study.write_text(json.dumps({"rows": ROWS}))
    assert make_denoising_pictures.main(["--folder", str(folder), "--study", str(study)]) == 0
    return folder


@pytest.mark.parametrize("name", ["noise", "mask", "curves"])
def test_pictures_are_drawn_and_small(name, pictures):
    path = pictures / f"{name}.png"
    assert path.stat().st_size < 150_000
    picture = Image.open(path).convert("RGB")
    assert picture.width == 800 and len(picture.getcolors(picture.width * picture.height)) > 20


def test_near_and_far_boxes_have_their_colours(pictures):
    picture = Image.open(pictures / "noise.png").convert("RGB")
    left, right = (picture.crop((x, 0, x + 400, picture.height)) for x in (0, 400))
    near, far = (0x2F, 0xD3, 0x5D), (0xFF, 0x3B, 0x30)
    for half, colours in ((left, {near}), (right, {near, far})):
        found = {colour for _, colour in half.getcolors(half.width * half.height)}
        assert found & {near, far} == colours


def test_without_a_study_there_are_no_curves(monkeypatch, tmp_path):
    for name in ("draw_noise", "draw_mask"):
        monkeypatch.setattr(make_denoising_pictures, name, lambda path: None)
    make_denoising_pictures.main(["--folder", str(tmp_path), "--study", str(tmp_path / "none")])
    assert list(tmp_path.iterdir()) == []
