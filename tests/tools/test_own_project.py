"""A project in somebody's own folder: trained, resumed, and run again from its `config.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.runs import run_tool

MODELING = """
from tests.engine.dummy import TinyDataset, TinyDetector, TinyEvaluator


class MyDataset(TinyDataset):
    pass


class MyDetector(TinyDetector):
    pass


class MyEvaluator(TinyEvaluator):
    pass
"""
CONFIG = """
from dn_detr.config import LazyCall as L
from dn_detr.configs.common.optimizer import optimizer
from dn_detr.configs.common.schedule_12ep import lr_schedule, train
from dn_detr.data import build_test_loader, build_train_loader

from ..modeling import MyDataset, MyDetector, MyEvaluator

model = L(MyDetector)(num_classes=2)
dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(MyDataset)(length=8), total_batch_size=4, num_workers=1, seed="${train.seed}"
    ),
    test=L(build_test_loader)(dataset=L(MyDataset)(length=4), batch_size=2, num_workers=0),
    evaluator=L(MyEvaluator)(),
)
train.device = "cpu"
train.epochs = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the package `my_project`."""
    (tmp_path / "my_project" / "configs").mkdir(parents=True)
    (tmp_path / "my_project" / "__init__.py").touch()
    (tmp_path / "my_project" / "modeling.py").write_text(MODELING)
    (tmp_path / "my_project" / "configs" / "my_config.py").write_text(CONFIG)
    return tmp_path


@pytest.mark.slow
def test_own_project_is_trained_by_two_processes_resumed_and_run_again(folder: Path) -> None:
    config = str(folder / "my_project" / "configs" / "my_config.py")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    output = f"train.output_dir={folder}/run"
    done = run_tool("train_net", "--config-file", config, "--num-gpus", "2", output, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    more = run_tool(
        *("train_net", "--config-file", config, "--resume", output, "train.epochs=2"),
        cwd=elsewhere,
    )
    assert more.returncode == 0, more.stderr
    saved = str(folder / "run" / "config.yaml")
    again = ("--config-file", saved, f"train.output_dir={folder}/again")
    refused = run_tool("train_net", *again, cwd=folder)
    assert refused.returncode == 1 and "add --trust my_project" in refused.stderr
    lost = run_tool("train_net", *again, "--trust", "my_project", cwd=elsewhere)
    assert lost.returncode == 1 and "run the command in the folder that has" in lost.stderr
    repeated = run_tool("train_net", *again, "--trust", "my_project", cwd=folder)
    assert repeated.returncode == 0, repeated.stderr


@pytest.mark.slow
def test_own_project_is_trained_by_a_job_from_its_saved_config(folder: Path) -> None:
    pytest.importorskip("submitit")
    config = str(folder / "my_project" / "configs" / "my_config.py")
    printed = run_tool("train_net", "--config-file", config, "--print-config", cwd=folder)
    assert printed.returncode == 0, printed.stderr
    (folder / "config.yaml").write_text(printed.stdout)
    submitted = run_tool(
        *("submit", "--config-file", "config.yaml", "--trust", "my_project"),
        *("--cluster", "local", "--processes-per-node", "1", "--time", "10"),
        f"train.output_dir={folder}/run",
        cwd=folder,
        PYTHONPATH=str(Path(__file__).resolve().parents[2]),  # of the job, a process of its own
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert (folder / "run" / "checkpoints" / "last").exists()
