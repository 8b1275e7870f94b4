"""The same weights in every layout evaluate to the same numbers on real COCO images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dn_detr.checkpoint import read_weights, save_weights
from dn_detr.config import LazyConfig, get_config, instantiate
from tests.engine.runs import run_tool

THIN = ("model.transformer.encoder.num_layers=2", "model.transformer.decoder.num_layers=2")


def _run(tool: str, *arguments: object) -> None:
    done = run_tool(tool, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def _evaluate(config: str, weights: Path, data: Path, output: Path) -> tuple[bytes, bytes]:
    _run(
        "train_net",
        *("--config-file", config, *THIN, "--eval-only", f"train.init_checkpoint={weights}"),
        *(f"dataloader.root={data}", f"train.output_dir={output}", "train.device=cpu"),
        *("dataloader.image_scale=0.3", "dataloader.test.limit=2"),
    )
    return tuple(
        (output / "eval" / name).read_bytes() for name in ("metrics.json", "predictions.json")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "dn_detr_r50_50ep",
        "dn_deformable_detr_r50_50ep",
        "dab_deformable_detr_r50_two_stage_50ep",
    ],
)
def test_weights_of_every_layout_evaluate_to_the_same_coco_numbers(config, shared, tmp_path):
    data = shared / "data/coco_mini"
    cfg = LazyConfig.apply_overrides(get_config(config), list(THIN))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    with torch.no_grad():  # at initialisation all queries say the same
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = tmp_path / "ours"
    save_weights(ours, model.state_dict(), config=LazyConfig.to_yaml(cfg))
    layouts = ["detrex"] if "two_stage" in config else ["official", "detrex"]
    expected = _evaluate(config, ours, data, tmp_path / "run")
    assert len(expected[1]) > 10_000
    for layout in layouts:
        file, back = tmp_path / f"{layout}.pth", tmp_path / f"back_from_{layout}"
        _run(
            "convert_checkpoint",
            *("--config-file", config, *THIN, "--input", ours, "--output", file, "--to", layout),
        )
        assert _evaluate(config, file, data, tmp_path / f"run_{layout}") == expected
        _run(
            "convert_checkpoint",
            *("--config-file", config, *THIN, "--input", file, "--output", back),
        )
        before, after = read_weights(ours), read_weights(back)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
