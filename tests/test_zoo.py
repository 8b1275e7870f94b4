"""Every config of the zoo builds, prints, trains, evaluates, and runs again from its YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dn_detr.checkpoint import read_weights
from dn_detr.config import LazyConfig, get_config, instantiate, list_configs
from dn_detr.data.digits import write_digits_dataset
from dn_detr.engine import train

NUM_PARAMETERS = {
    "dn_deformable_detr_r50_50ep.py": 47_409_387
}  # of the published model, 80 classes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_digits_dataset(tmp_path_factory.mktemp("zoo") / "digits", num_train=4, num_val=2)


def _two_steps(cfg: Any, data: Path, output: Path) -> Any:
    overrides = [
        f"dataloader.root={data}",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.train.dataset.transforms.max_size=64",
        "dataloader.test.num_workers=0",
        "dataloader.test.dataset.transforms.max_size=64",
        "model.backbone.weights=null",
        "train.device=cpu",
        "train.max_iter=2",
        f"train.output_dir={output}",
    ]
    return LazyConfig.apply_overrides(cfg, overrides)


def test_the_zoo_is_not_empty():
    assert {"dn_deformable_detr_r50_50ep.py", "digits_dn_deformable_detr.py"} <= set(list_configs())


@pytest.mark.parametrize("name", list_configs())
def test_config_trains_evaluates_and_runs_again_from_its_yaml(name, data, tmp_path):
    first = train(_two_steps(get_config(name), data, tmp_path / "first"))
    saved = LazyConfig.load(tmp_path / "first" / "config.yaml")
    again = train(_two_steps(saved, data, tmp_path / "again"))
    assert first == again and first["AP"] >= 0
    weights, repeated = (read_weights(tmp_path / run) for run in ("first", "again"))
    assert all(torch.equal(weights[key], repeated[key]) for key in weights)


def test_a_model_is_fine_tuned_to_fewer_classes(data, tmp_path):
    """From ten classes to three: everything but the classification comes from the checkpoint."""
    name = "digits_dn_deformable_detr.py"
    train(_two_steps(get_config(name), data, tmp_path / "ten"))
    three = tmp_path / "three"
    root = write_digits_dataset(three / "digits", num_train=4, num_val=2)
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"] = content["categories"][:3]
        kept = [a for a in content["annotations"] if a["category_id"] <= 3]
        content["annotations"] = kept or [content["annotations"][0] | {"category_id": 1}]
        path.write_text(json.dumps(content))
    cfg = LazyConfig.apply_overrides(
        _two_steps(get_config(name), root, three / "run"),
        ["model.num_classes=3", f"train.init_checkpoint={tmp_path / 'ten'}", "optimizer.lr=0.0"],
    )
    train(cfg)
    before, after = read_weights(tmp_path / "ten"), read_weights(three / "run")
    same = [key for key in before if torch.equal(before[key], after[key])]
    other = {key for key in before if before[key].shape != after[key].shape}
    assert "heads.class_embed.0.weight" in other and "denoising.label_embed.weight" in other
    assert "transformer.encoder.layers.0.ffn.linear1.weight" in same
    assert "another number of classes" in (three / "run" / "log.txt").read_text()


def test_the_published_recipe_is_in_the_config():
    """AdamW 1e-4, backbone a tenth, decay 1e-4, clip 0.1, a tenth at epoch 40 of 50, batch 16."""
    cfg = get_config("dn_deformable_detr_r50_50ep.py")
    model = instantiate(cfg.model)
    groups = instantiate(cfg.optimizer.params, model=model)
    optimizer = instantiate(cfg.optimizer, params=groups)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"default": 1e-4, "backbone": 1e-5})
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)
    assert cfg.train.clip_grad.max_norm == 0.1 and cfg.train.clip_grad.norm_type == 2.0
    rule = instantiate(cfg.lr_schedule)
    assert [rule(epoch, 50) for epoch in (0, 39.99, 40, 49)] == pytest.approx([1, 1, 0.1, 0.1])
    assert cfg.train.epochs == 50 and cfg.dataloader.train.total_batch_size == 16
    augmentation = cfg.dataloader.train.dataset.transforms
    assert augmentation.flip_probability == augmentation.crop_probability == 0.5
    assert list(augmentation.short_sides) == list(range(480, 801, 32))
    assert cfg.dataloader.train.dataset.seed == cfg.dataloader.train.seed == cfg.train.seed
    denoising = model.denoising
    assert (denoising.num_groups, denoising.label_noise, denoising.box_noise) == (5, 0.2, 0.4)


@pytest.mark.parametrize("name", list_configs())
def test_config_prints_without_interpolations_left(name):
    text = LazyConfig.to_yaml(get_config(name), resolve=True)
    assert "_target_: dn_detr.modeling.detector.Detector" in text and "${" not in text


@pytest.mark.parametrize("name", list_configs())
def test_predictions_of_an_image_are_the_same_alone_and_in_a_batch(name):
    torch.manual_seed(0)
    model = instantiate(get_config(name).model).eval()
    with torch.no_grad():  # at initialisation boxes depend on nothing
        for parameter in [*model.transformer.parameters(), *model.heads.parameters()]:
            parameter.add_(0.02 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"image": torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)}
        for size in ((75, 110), (128, 64), (33, 47))
    ]
    with torch.no_grad():
        batch = model.forward_tensors(*model.preprocess(samples))
        for row, sample in enumerate(samples):
            alone = model.forward_tensors(*model.preprocess([sample]))
            for key, value in alone.items():
                torch.testing.assert_close(batch[key][row], value[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "count"), NUM_PARAMETERS.items())
def test_number_of_parameters_is_the_published_one(name, count):
    model = instantiate(get_config(name).model)
    assert sum(p.numel() for p in model.parameters()) == count
