from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dn_detr.checkpoint import save_checkpoint
from dn_detr.config import LazyConfig, get_config, instantiate
from tools import make_digits, make_pictures

pytest.importorskip("sklearn", reason="needs the extra `demo`")

FEW = ["--num-train", "1", "--num-val", "2"]


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    assert make_digits.main(["--root", str(root), *FEW]) == 0
    return root


@pytest.fixture(scope="module")
def run_folder(digits_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training would leave, with untrained weights."""
    folder = tmp_path_factory.mktemp("run")
    cfg = get_config("digits_dn_deformable_detr.py")
    cfg = LazyConfig.apply_overrides(cfg, [f"dataloader.root={digits_root}"])
    LazyConfig.save(cfg, folder / "config.yaml")
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    save_checkpoint(folder, model.state_dict(), {}, iteration=10, epoch=1.0)
    rows = [
        {"iteration": 10, "loss": 3.0, "loss/loss_ce": 2.0, "loss/loss_ce_dn": 1.0},
        {"iteration": 10, "eval/AP": 0.25, "eval/AP50": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_make_digits_passes_its_options_on(tmp_path: Path) -> None:
    options = ["--image-size", "64", "--digits-per-image", "2", "2", "--digit-size", "10", "12"]
    root = tmp_path / "digits"
    assert make_digits.main(["--root", str(root), *FEW, *options]) == 0
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert content["images"][0]["width"] == 64
    assert len(content["annotations"]) == 2


def test_make_digits_reports_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_digits.main(["--root", str(tmp_path / "digits"), "--max-overlap", "2"]) == 1
    assert "max_overlap=2.0" in capsys.readouterr().err


def test_make_pictures_draws_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(run_folder), "--images", "2", "--score-threshold", "0"]
    assert make_pictures.main(arguments) == 0
    for name in ("predictions.png", "curves.png"):
        with Image.open(run_folder / name) as picture:
            assert picture.format == "PNG"
    assert "AP50 0.500, AP 0.250" in capsys.readouterr().out


def test_make_pictures_names_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_pictures.main(["--run", str(tmp_path)]) == 1
    assert str(tmp_path / "metrics.jsonl") in capsys.readouterr().err
