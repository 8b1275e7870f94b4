"""The command that converts weights, and the commands that use what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dn_detr.checkpoint import read_manifest, read_weights, save_weights
from dn_detr.config import LazyConfig, get_config, instantiate
from tools import train_net
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "tests" / "engine" / "tiny_config.py")
CHANNELS = {
    "dn_detr_r50_50ep": [512],
    "dab_deformable_detr_r50_two_stage_50ep": [128, 256, 512],
}
SMALL = (
    "model.num_queries=7",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.neck.in_channels=[512]",
    "model.transformer.embed_dim=32",
    "model.position_embedding.num_pos_feats=16",
    *(
        f"model.transformer.{half}.{knob}"
        for half in ("encoder", "decoder")
        for knob in ("num_layers=1", "layer.num_heads=2", "layer.feedforward_dim=8")
    ),
)


def convert(*arguments, config="dn_detr_r50_50ep", overrides=SMALL):
    return main(["--config-file", config, *overrides, *map(str, arguments)])


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file of the authors' code, for the small model."""
    folder = tmp_path_factory.mktemp("official")
    cfg = get_config("dn_detr_r50_50ep.py")
    model = instantiate(LazyConfig.apply_overrides(cfg, list(SMALL)).model)
    torch.save(model.state_dict(), folder / "ours.pth")
    file = folder / "official.pth"
    assert convert("--input", folder / "ours.pth", "--output", file, "--to", "official") == 0
    return file


def test_every_target_is_written(official, tmp_path, capsys):
    assert convert("--input", official, "--output", tmp_path / "ours") == 0
    printed = capsys.readouterr().out
    assert "official layout, every tensor loaded" in printed
    assert "note: 91 class rows were mapped to 80 classes by class name" in printed
    manifest = read_manifest(tmp_path / "ours")
    assert manifest.class_names[0] == "person" and "num_queries: 7" in manifest.config
    detrex = tmp_path / "detrex.pth"
    assert convert("--input", tmp_path / "ours", "--to", "detrex", "--output", detrex) == 0
    assert convert("--input", detrex, "--to", "official", "--output", tmp_path / "b.pth") == 0
    first, second = read_weights(official), read_weights(tmp_path / "b.pth")
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_overrides_decide_on_the_classes(official, tmp_path):
    overrides = (*SMALL, "model.num_classes=91")
    assert convert("--input", official, "--output", tmp_path / "ours", overrides=overrides) == 0
    assert read_weights(tmp_path / "ours")["heads.class_embed.0.bias"].shape == (91,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent.pth", "--output", "out"], "absent.pth: no such file"),
        (["--input", "{file}", "--output", "{file}"], "exists; choose another output"),
        (["--input", "{file}", "--output", "out", "--ema"], "no EMA"),
        (["--input", "{file}", "--output", "out", "model.num_queries=8"], "of another shape"),
        (["--input", "{file}", "--output", "out", "model.num_querys=8"], "num_queries"),
    ],
)
def test_mistakes_are_told_in_one_message(
    official, capsys, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert convert(*[a.format(file=official) for a in arguments]) == 1
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and "Traceback" not in printed


@pytest.mark.parametrize("config", ["dn_detr_r50_50ep", "dab_deformable_detr_r50_two_stage_50ep"])
def test_the_same_weights_detect_the_same_in_every_layout(shared, tmp_path, config):
    overrides = (*SMALL, f"model.neck.in_channels={CHANNELS[config]}")
    cfg = LazyConfig.apply_overrides(get_config(f"{config}.py"), list(overrides))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    with torch.no_grad():
        for parameter in model.heads.parameters():  # away from the start, where all boxes agree
            parameter.add_(0.3 * torch.randn_like(parameter))
    files = {name: tmp_path / f"{name}.pth" for name in ("bare", "official", "detrex")}
    torch.save(model.state_dict(), files["bare"])
    files["ours"] = tmp_path / "ours"
    if "two_stage" in config:  # the authors' code has another two-stage model
        del files["official"]
    for to in sorted(files.keys() & {"official", "detrex"}):
        arguments = ("--input", files["bare"], "--output", files[to], "--to", to)
        assert convert(*arguments, config=config, overrides=overrides) == 0
    arguments = ("--input", files["detrex"], "--output", files["ours"])
    assert convert(*arguments, config=config, overrides=overrides) == 0
    detections = {}
    for name, file in files.items():
        output = tmp_path / f"evaluated {name}"
        arguments = [
            *("--config-file", config, "--eval-only", *overrides),
            f"train.init_checkpoint={file}",
            f"train.output_dir='{output}'",
            f"dataloader.root={shared / 'data/coco_mini'}",
            "train.device=cpu",
            "dataloader.image_scale=0.1",
            "dataloader.test.limit=3",
            "dataloader.test.batch_size=1",
            "dataloader.test.num_workers=0",
        ]
        assert train_net.main(arguments) == 0
        written = sorted(path for path in (output / "eval").iterdir() if path.suffix == ".json")
        detections[name] = {path.name: path.read_text() for path in written}
    assert any(len(text) > 10_000 for text in detections["bare"].values())
    assert all(found == detections["bare"] for found in detections.values())


@pytest.mark.parametrize("to", ["official", "detrex"])
def test_a_model_of_eighty_other_classes_is_evaluated_from_every_layout(shared, tmp_path, to):
    coco = shared / "data/coco_mini"
    content = json.loads((coco / "annotations/instances_val2017.json").read_text())
    for index, category in enumerate(content["categories"], start=1):
        category["name"] = f"part{index}"
    (tmp_path / "data/annotations").mkdir(parents=True)
    (tmp_path / "data/annotations/instances_val2017.json").write_text(json.dumps(content))
    (tmp_path / "data/val2017").symlink_to(coco / "val2017")
    names = [category["name"] for category in content["categories"]]
    cfg = LazyConfig.apply_overrides(get_config("dn_detr_r50_50ep.py"), list(SMALL))
    run = save_weights(tmp_path / "run", instantiate(cfg.model).state_dict(), class_names=names)
    assert convert("--input", run, "--output", tmp_path / "f.pth", "--to", to) == 0
    arguments = [
        *("--config-file", "dn_detr_r50_50ep", "--eval-only", *SMALL),
        f"train.init_checkpoint={tmp_path / 'f.pth'}",
        f"train.output_dir='{tmp_path / 'evaluated'}'",
        f"dataloader.root={tmp_path / 'data'}",
        "train.device=cpu",
        "dataloader.image_scale=0.1",
        "dataloader.test.limit=1",
        "dataloader.test.num_workers=0",
    ]
    assert train_net.main(arguments) == 0


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A run of the tiny detector, and its weights as a converted checkpoint."""
    folder = tmp_path_factory.mktemp("converted")
    assert train(f"train.output_dir={folder}/run", "train.max_iter=3") == 0
    arguments = ("--input", folder / "run", "--output", folder / "weights")
    assert convert(*arguments, config=CONFIG, overrides=()) == 0
    return folder


def train(*arguments):
    return train_net.main(["--config-file", CONFIG, *map(str, arguments)])


def test_converted_weights_can_be_evaluated(converted, tmp_path):
    start = f"train.init_checkpoint={converted / 'weights'}"
    assert train("--eval-only", start, f"train.output_dir={tmp_path}") == 0
    trained, weights = read_weights(converted / "run"), read_weights(converted / "weights")
    assert trained.keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in trained.items())


def test_a_training_can_start_from_converted_weights(converted, tmp_path):
    start = f"train.init_checkpoint={converted / 'weights'}"
    assert train(start, f"train.output_dir={tmp_path}", "train.max_iter=1") == 0
    assert (tmp_path / "checkpoints" / "last").exists()


def test_converted_weights_cannot_be_resumed(converted, capsys):
    assert train("--resume", f"train.output_dir={converted / 'weights'}") == 1
    assert "itself a checkpoint" in capsys.readouterr().err
