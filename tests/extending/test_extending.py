"""The code of docs/extending.md runs as it stands there, in a package outside the library.

The processes that a test starts have the library as pip installs it, not the checkout.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dn_detr.checkpoint import read_weights
from tools.train_net import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
# The files of the page by their path, which is the comment in their first line.
FILES = {
    path: f"# {path}\n{code}"
    for path, code in re.findall(r"```python\n# (my_project/\S+)\n(.*?)```", PAGE, re.DOTALL)
}
CONFIGS = sorted(Path(path).stem for path in FILES if "/configs/" in path)
SMALL = (
    "train.device=cpu",
    "train.log_period=1",
    "train.checkpoint.period=1",
    "train.checkpoint.keep=9",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
)
TIMES = ("data_time", "iter_time", "images_per_s", "memory_mib")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the page, the demo's data set, and the installed library."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("extending")
    install(folder)
    for path, code in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code, encoding="utf-8")
    (folder / "my_project" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("everything.py"), folder / "my_project" / "configs")
    digits = ("--root", "datasets/digits", "--num-train", "8", "--num-val", "4")
    made = run(folder, "make_digits.py", *digits)
    assert made.returncode == 0, made.stderr
    return folder


def install(folder: Path) -> None:
    """Install the library into `installed` without compiled operators, for want of a torch."""
    for name in ("dn_detr", "configs", "projects", "tools"):
        no_operators = shutil.ignore_patterns("_C*", "__pycache__")
        shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=no_operators)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "checkout")
    (folder / "no_torch").mkdir()
    (folder / "no_torch" / "torch.py").write_text("raise ImportError")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", folder / "installed", folder / "checkout"],
        env={**os.environ, "PYTHONPATH": str(folder / "no_torch")},
        check=True,
    )
    shutil.rmtree(folder / "checkout")


def run(folder: Path, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a tool in this folder, in a process that knows the package by nothing else."""
    installed = folder / "installed"
    return subprocess.run(
        [sys.executable, str(installed / "dn_detr" / "tools" / tool), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def train(folder: Path, config: str, *arguments: str) -> str:
    """Train, which must succeed; return the output."""
    ended = run(folder, "train_net.py", "--config-file", config, *SMALL, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def records(folder: Path) -> list[dict[str, Any]]:
    """The log records of a run, without times and memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_page_has_a_config_for_each_door():
    assert CONFIGS == ["my_backbone", "my_callback", "my_data", "my_detector", "my_loss"]


@pytest.mark.parametrize("config", CONFIGS)
def test_config_of_the_page_trains_and_evaluates(folder, config, monkeypatch):
    monkeypatch.chdir(folder)
    file = f"my_project/configs/{config}.py"
    assert main(["--config-file", file, *SMALL, "train.max_iter=1"]) == 0
    assert (folder / "output" / config / "checkpoints" / "last" / "manifest.json").is_file()
    assert any("eval/AP" in r or "eval/coverage" in r for r in records(folder / "output" / config))


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """A run of three steps of the config that uses everything."""
    config = "my_project/configs/everything.py"
    train(folder, config, "train.max_iter=3", "train.output_dir=output/uninterrupted")
    return folder / "output" / "uninterrupted"


def test_every_part_is_at_work(uninterrupted):
    step = records(uninterrupted)[0]
    assert step["loss/loss_area"] > 0 and step["loss/loss_area_dn"] > 0
    assert "loss/loss_area_0" in step and step["weights/distance"] > 0
    assert 0 <= records(uninterrupted)[-1]["eval/coverage"] <= 1
    config = (uninterrupted / "config.yaml").read_text()
    for name in ("decoder.ImageFirstLayer", "backbone.ConvBackbone", "losses.AreaCost"):
        assert f"my_project.{name}" in config


def test_resumed_run_ends_as_the_uninterrupted_one(folder, uninterrupted):
    resumed = folder / "output" / "resumed"
    shutil.copytree(uninterrupted, resumed, symlinks=True)
    for checkpoint in ("0000002", "0000003"):
        shutil.rmtree(resumed / "checkpoints" / checkpoint)
    train(
        folder, "my_project/configs/everything.py", "--resume",
        "train.max_iter=3", "train.output_dir=output/resumed",
    )  # fmt: skip
    assert records(resumed) == records(uninterrupted)


def test_run_is_repeated_from_its_own_config_once_its_package_is_trusted(folder, uninterrupted):
    config = "output/uninterrupted/config.yaml"
    train(folder, config, "--trust", "my_project", "train.output_dir=output/repeated")
    assert records(folder / "output" / "repeated") == records(uninterrupted)
    weights = "train.init_checkpoint=output/uninterrupted"
    shown = train(folder, config, "--trust", "my_project", "--eval-only", weights)
    assert "coverage" in shown


def test_file_of_another_code_base_loads_through_the_key_map(folder, uninterrupted):
    theirs = {
        f"net.{name.replace('transformer.decoder.', 'query_decoder.')}": value
        for name, value in read_weights(uninterrupted).items()
    }
    torch.save({"model": theirs}, folder / "theirs.pth")
    config = "my_project/configs/everything.py"
    weights = "train.init_checkpoint=theirs.pth"
    output = "train.output_dir=output/foreign"
    assert "image_first layout" in train(folder, config, "--eval-only", weights, output)


def test_config_of_a_run_does_not_grant_trust_itself(uninterrupted, capsys):
    assert main(["--config-file", str(uninterrupted / "config.yaml")]) == 1
    assert "--trust my_project" in capsys.readouterr().err
