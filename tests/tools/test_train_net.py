"""The real command in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dn_detr.checkpoint import read_weights
from tests.engine.runs import Group, Run, run_tool, wait_until
from tools.train_net import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")
COMMAND = [str(ROOT / "tools" / "train_net.py"), "--config-file", CONFIG]


def run(*arguments: str, launcher: tuple[str, ...] = (), **environment: str):
    return subprocess.run(
        [sys.executable, *launcher, *COMMAND, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def assert_equal_weights(first: Path, second: Path) -> None:
    expected, found = read_weights(first), read_weights(second)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_two_processes_train_evaluate_and_stop_together_on_nan(tmp_path):
    arguments = ("--num-gpus", "2", f"train.output_dir={tmp_path}/a", "model.nan_at=5")
    done = run_tool("train_net", *COMMAND[1:], *arguments, "model.nan_rank=1")
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: iteration 5: loss terms loss_class not finite")
    assert error.count("rank 0:") == error.count("rank 1:") == 1
    assert error.count("image images/") == 4
    assert "Traceback" not in done.stderr
    assert len(losses(tmp_path / "a")) == 2
    assert '"eval/AP"' in (tmp_path / "a" / "metrics.jsonl").read_text()  # after iteration 3


def test_an_interrupt_of_the_parent_alone_stops_all_processes(tmp_path):
    with Run(tmp_path / "a", "--num-gpus", "2", "train.epochs=100000") as parent:
        metrics = tmp_path / "a" / "metrics.jsonl"
        wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0)
        assert parent.signal(signal.SIGINT).wait() == 75
        assert "--resume continues" in parent.log


def test_two_processes_give_the_weights_of_one(tmp_path):
    # Adam would make whole steps out of rounding errors.
    overrides = ("model.dropout=0.0", "optimizer._target_=torch.optim.SGD")
    assert main([*COMMAND[1:], *overrides, f"train.output_dir={tmp_path}/one"]) == 0
    arguments = ("--num-gpus", "2", *overrides, f"train.output_dir={tmp_path}/two")
    two = run_tool("train_net", *COMMAND[1:], *arguments)
    assert two.returncode == 0, two.stderr
    expected, found = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_torchrun_and_num_gpus_give_the_same_weights(tmp_path):
    with Run(tmp_path / "a", "--num-gpus", "2") as started:
        started.succeed()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    torchrun = run(f"train.output_dir={tmp_path}/b", launcher=launcher)
    assert torchrun.returncode == 0, torchrun.stderr
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.slow
def test_nan_in_one_process_of_torchrun_ends_both(tmp_path):
    with Group(tmp_path / "a", "model.nan_at=2", "model.nan_rank=1") as group:
        assert group.wait() == [1, 1]
        assert "error (rank 1): iteration 2: loss terms loss_class not finite" in group.log


def test_eval_only_gives_the_numbers_of_the_evaluation_inside_training(tmp_path, capsys):
    folder = tmp_path / "a"
    assert main([*COMMAND[1:], f"train.output_dir={folder}"]) == 0
    inside = capsys.readouterr().out.split("evaluation: ")[-1].splitlines()[0]
    checkpoint = f"train.init_checkpoint={folder}/checkpoints/last"
    arguments = [*COMMAND[1:], "--eval-only", checkpoint, f"train.output_dir={tmp_path}/b"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split("evaluation: ")[-1].splitlines()[0] == inside


def test_print_config_prints_only_a_config_that_can_be_read_back(tmp_path, capsys):
    from dn_detr.config import LazyConfig

    assert main([*COMMAND[1:], "--print-config", "train.seed=7"]) == 0
    printed = capsys.readouterr()
    (tmp_path / "printed.yaml").write_text(printed.out)
    cfg = LazyConfig.load(tmp_path / "printed.yaml", allow=("tests",))
    assert cfg.train.seed == 7
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.output_dri=x"], "did you mean train.output_dir?"),
        (["train.epochs=many"], "train.epochs"),
        (["--eval-only", "train.output_dir=/absent"], "nothing to evaluate"),
        (["--eval-only", "train.init_checkpoint=/absent"], "/absent: no such file or folder"),
        (["--num-gpus", "1000", "train.device=auto"], "--num-gpus 1000: this machine has"),
        (["train.output_dir=/dev/null/x"], "cannot be created"),
        (["dataloader.train.total_batch_size=100"], "fewer than one batch of 100"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_code_1(tmp_path, capsys, arguments, message):
    default = [f"train.output_dir={tmp_path}/run"]
    assert main([*COMMAND[1:], *default, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_missing_config_file_is_one_clear_message(capsys):
    assert main(["--config-file", "no_such_model"]) == 1
    assert "no config file 'no_such_model'" in capsys.readouterr().err


def test_a_new_run_into_a_used_folder_is_refused_with_the_remedy(tmp_path, capsys):
    arguments = [*COMMAND[1:], f"train.output_dir={tmp_path}", "train.max_iter=1"]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "add --resume to continue it" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.engine.dummy.TinyDetector.forward", lambda self: None)
    with pytest.raises(TypeError):
        main([*COMMAND[1:], f"train.output_dir={tmp_path}"])


def test_options_and_overrides_mix_in_any_order(tmp_path, capsys):
    assert main(["train.seed=3", *COMMAND[1:], "--print-config", "train.epochs=9"]) == 0
    assert "seed: 3" in capsys.readouterr().out


def test_wrong_options_exit_with_2():
    with pytest.raises(SystemExit) as error:
        main(["--config"])
    assert error.value.code == 2
