"""Every config of the zoo builds, prints, trains, evaluates, and runs again from its YAML."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from dn_detr.checkpoint import last_checkpoint, read_weights
from dn_detr.config import LazyConfig, get_config, instantiate, list_configs
from dn_detr.config.zoo import zoo_root
from dn_detr.engine import train
from tests.checkpoint.layouts import to_layout
from tools import train_net
from tools.make_digits import write_digits_dataset

_DAB, _DN = 43_668_690, 43_689_345
# Published, with 80 classes. A pattern has 256 numbers; a dilated backbone has the same ones.
NUM_PARAMETERS = {
    "dab_detr_r50_50ep.py": _DAB,
    "dab_detr_r50_dc5_50ep.py": _DAB,
    "dab_detr_r50_3pat_50ep.py": _DAB + 3 * 256,
    "dab_detr_r50_dc5_3pat_50ep.py": _DAB + 3 * 256,
    "dn_detr_r50_12ep.py": _DN,
    "dn_detr_r50_50ep.py": _DN,
    "dn_detr_r50_dc5_12ep.py": _DN,
    "dn_detr_r50_dc5_50ep.py": _DN,
    "dn_detr_r50_dc5_3pat_12ep.py": _DN + 3 * 256,
    "dab_deformable_detr_r50_50ep.py": 47_389_032,
    "dab_deformable_detr_r50_two_stage_50ep.py": 47_530_508,
    "dn_deformable_detr_r50_12ep.py": 47_409_387,
    "dn_deformable_detr_r50_24ep.py": 47_409_387,
    "dn_deformable_detr_r50_50ep.py": 47_409_387,
    "dino_r50_4scale_detrex_12ep.py": 47_650_316,
}


def _model_text(name: str) -> str:
    cfg = get_config(name)
    OmegaConf.resolve(cfg)
    return LazyConfig.to_yaml(OmegaConf.create({"model": cfg.model}))


# One of each family; the others differ in depth, dilation, patterns or schedule.
FAMILIES = {
    "dab_detr_r50_3pat_50ep.py",
    "dab_deformable_detr_r50_two_stage_50ep.py",
    "digits_deformable_detr.py",
    "digits_deformable_detr_two_stage.py",
    "digits_dino.py",
    "digits_dn_anchor_detr.py",
    "digits_dn_conditional_detr.py",
    "digits_dn_deformable_detr.py",
    "digits_dn_faster_rcnn.py",
    "digits_dn_vanilla_detr.py",
    "dn_deformable_detr_r50_50ep.py",
    "dn_deformable_encoder_only_r50_12ep.py",
    "dn_detr_r50_dc5_50ep.py",
    "dn_detr_swin_t_50ep.py",
}
# Fewer layers of the others: a deeper stack of the same layers adds nothing but time.
THIN = ["model.transformer.encoder.num_layers=1", "model.transformer.decoder.num_layers=2"]


def _has_transformer(name: str) -> bool:
    """A Faster R-CNN is none of DETR's kind: no layers to take away, other schedule and optimizer,
    and a backbone that sees the padding."""
    return "faster_rcnn" not in name


def _slow_but_for_families(names: list[str]) -> list[Any]:
    return [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in names]


def _stem(name: str) -> str:
    """Of the configs that differ in their schedule only."""
    return re.sub(r"_\d+ep\.py$", "", name)


def _one_of_each_model() -> list[str]:
    models: dict[str, str] = {}
    for name in sorted(list_configs(), key=lambda name: (name not in FAMILIES, name)):
        models.setdefault(_stem(name), name)
    return sorted(models.values())


def test_configs_whose_names_differ_in_the_epochs_have_one_model():
    models = defaultdict(set)
    for name in list_configs():
        models[_stem(name)].add(_model_text(name))
    assert all(len(texts) == 1 for texts in models.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_digits_dataset(tmp_path_factory.mktemp("zoo") / "digits", num_train=4, num_val=2)


def _small_and_short(data: Path, output: Path) -> list[str]:
    return [
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


def _two_steps(cfg: Any, data: Path, output: Path, *overrides: str) -> Any:
    return LazyConfig.apply_overrides(cfg, [*_small_and_short(data, output), *overrides])


def test_the_zoo_is_not_empty():
    assert {"dn_deformable_detr_r50_50ep.py", "digits_dn_deformable_detr.py"} <= set(list_configs())


# A ResNet-101 is a deeper ResNet-50, a Swin-L a deeper Swin-T: it trains in one of them.
_OF_50_LAYERS = [n for n in _one_of_each_model() if "r101" not in n and "swin_l" not in n]
_DIGITS = [name for name in list_configs() if name.startswith("digits_")]
_PUBLISHED = [name for name in _OF_50_LAYERS if name not in _DIGITS]


@pytest.mark.parametrize(
    "name", _slow_but_for_families([*_PUBLISHED, "dn_deformable_detr_r101_50ep.py"])
)
def test_config_trains_and_evaluates_from_its_yaml(name, data, tmp_path):
    LazyConfig.save(get_config(name), tmp_path / "config.yaml")
    saved = LazyConfig.load(tmp_path / "config.yaml")
    thin = THIN if name not in FAMILIES and _has_transformer(name) else ()
    metrics = train(_two_steps(saved, data, tmp_path / "run", *thin, "train.max_iter=1"))
    assert metrics["AP"] >= 0
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["iteration"] == 1


@pytest.mark.parametrize("name", _slow_but_for_families(_DIGITS))
def test_a_config_of_the_digits_trains_evaluates_and_resumes_in_bfloat16(name, data, tmp_path):
    amp = ["train.amp.enabled=true", "train.amp.dtype=bfloat16", "train.checkpoint.period=1"]
    cfg = _two_steps(get_config(name), data, tmp_path / "run", *amp)
    whole = train(cfg)
    assert whole["AP"] >= 0
    weights = read_weights(tmp_path / "run")
    shutil.rmtree(last_checkpoint(tmp_path / "run"))
    assert train(cfg, resume=True) == whole
    resumed = read_weights(tmp_path / "run")
    assert all(torch.equal(value, resumed[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", ["digits_dn_deformable_detr.py", "dn_detr_r50_50ep.py"])
def test_a_run_repeats_from_its_saved_config_to_the_bit(name, data, tmp_path):
    thin = THIN if "r50" in name else ()
    first = train(_two_steps(get_config(name), data, tmp_path / "first", *thin))
    saved = LazyConfig.load(tmp_path / "first" / "config.yaml")
    again = train(_two_steps(saved, data, tmp_path / "again"))
    assert first == again
    weights, repeated = (read_weights(tmp_path / run) for run in ("first", "again"))
    assert all(torch.equal(weights[key], repeated[key]) for key in weights)


def _keep_three_categories(root: Path, names: list[str]) -> Path:
    """The first three categories of a data set under these names."""
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["categories"] = content["categories"][:3]
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        kept = [a for a in content["annotations"] if a["category_id"] <= 3]
        content["annotations"] = kept or [content["annotations"][0] | {"category_id": 1}]
        path.write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("official", "dn_detr_r50_12ep"),
        pytest.param("detrex", "dn_deformable_detr_r50_12ep", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_from_a_published_file_is_one_command(layout, name, tmp_path):
    """COCO's rows go to classes of their name; everything else comes from the file."""
    source = instantiate(get_config(name).model)
    file = tmp_path / "checkpoint.pth"
    content = {"model": to_layout(source.state_dict(), layout), "args": argparse.Namespace(lr=1)}
    torch.save(content, file)
    root = write_digits_dataset(tmp_path / "mine", num_train=4, num_val=2)
    _keep_three_categories(root, ["something new", "car", "Person "])
    overrides = [*_small_and_short(root, tmp_path / "run"), "optimizer.lr=0"]
    command = ["--config-file", name, "model.num_classes=3", f"train.init_checkpoint={file}"]
    assert train_net.main([*command, *overrides, "train.max_iter=1"]) == 0
    before, after = source.state_dict(), read_weights(tmp_path / "run")
    for key, value in after.items():
        if value.shape == before[key].shape:
            assert torch.equal(value, before[key]), key
        else:
            assert torch.equal(value[1], before[key][2]), key  # car
            assert torch.equal(value[2], before[key][0]), key  # person
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"({layout} layout)" in log and "2 of 3 classes take their rows by name" in log


@pytest.mark.parametrize("name", ["digits_dn_deformable_detr.py"])
def test_a_model_is_fine_tuned_on_other_classes_with_one_command(name, data, tmp_path):
    """Classes of the same name take their rows, new ones are re-initialised, all else is loaded."""
    ten = ["model.num_classes=10", "model.num_queries=30", "train.max_iter=1"]
    train(LazyConfig.apply_overrides(_two_steps(get_config(name), data, tmp_path / "ten"), ten))
    root = write_digits_dataset(tmp_path / "mine", num_train=4, num_val=2)
    _keep_three_categories(root, ["something new", "1", "2"])
    cfg = _two_steps(get_config(name), root, tmp_path / "run")
    three = ["model.num_classes=3", f"train.init_checkpoint={tmp_path / 'ten'}", "optimizer.lr=0.0"]
    train(LazyConfig.apply_overrides(cfg, [*three, "model.num_queries=30"]))
    before, after = read_weights(tmp_path / "ten"), read_weights(tmp_path / "run")
    for key, value in after.items():
        if "running_" in key or "num_batches" in key:  # statistics move without learning
            continue
        if value.shape == before[key].shape:
            assert torch.equal(value, before[key]), key
        else:  # classes 1 and 2 of the digits
            assert torch.equal(value[1:3], before[key][1:3]), key
            assert not torch.equal(value[0], before[key][0]), key
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 of 3 classes take their rows by name" in log and "something new" in log


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


DROP_EPOCHS = {12: [11], 24: [20], 36: [30], 50: [40], 300: [200], 500: [400]}


def _batch_size(name: str) -> int:
    """As published: the authors of each baseline, and those of DN-DETR."""
    if "vanilla" in name and "500ep" in name:
        return 64
    if name.startswith("deformable"):
        return 32
    by_one = ("anchor" in name and "50ep" in name) or ("conditional" in name and "dc5" in name)
    return 8 if by_one else 16


_SCHEDULED = [name for name in list_configs() if "digits" not in name and _has_transformer(name)]


@pytest.mark.parametrize("name", _SCHEDULED)
def test_every_config_has_the_schedule_of_its_name(name):
    cfg = get_config(name)
    epochs = int(name.removesuffix("ep.py").rpartition("_")[2])
    assert cfg.train.epochs == epochs
    assert list(cfg.lr_schedule.milestones) == DROP_EPOCHS[epochs] and cfg.lr_schedule.gamma == 0.1
    assert cfg.dataloader.train.total_batch_size == _batch_size(name)
    assert cfg.optimizer.lr == (2e-4 if name.startswith("deformable") else 1e-4)
    assert cfg.train.output_dir == f"output/{name.removesuffix('.py')}"


_FAMILY = sorted(path.name for path in zoo_root().glob("d[an]*.py"))


@pytest.mark.parametrize("name", _FAMILY)
def test_every_config_of_the_family_has_the_settings_of_its_name(name):
    """Backbone and the settings in which DAB- and DN-DETR and their variants differ."""
    model, parts = get_config(name).model, name.removesuffix(".py").split("_")
    deformable = "deformable" in parts
    encoder_only = "encoder" in parts
    if "swin" not in parts:
        assert model.backbone.name == ("resnet101" if "r101" in parts else "resnet50")
        assert model.backbone.dilation == ("dc5" in parts) and model.backbone.frozen_stages == 2
    assert model.num_patterns == (3 if "3pat" in parts or encoder_only else 0)
    assert (model.denoising is not None) == (parts[0] == "dn")
    if model.denoising is not None:
        assert model.denoising.num_groups == (10 if encoder_only else 5)
        assert (model.denoising.label_noise, model.denoising.box_noise) == (0.2, 0.4)
    published_100 = deformable and not encoder_only and "two" not in parts
    assert model.postprocess.num_select == (100 if published_100 else 300)
    position = (model.position_embedding.temperature, model.position_embedding.offset)
    if deformable and not encoder_only:
        assert position == (10000, -0.5)
    else:
        assert position == (10 if name == "dab_detr_r50_dc5_50ep.py" else 20, 0.0)
    activation = model.transformer.decoder.layer.get("activation", "relu")
    assert activation == ("relu" if deformable else "prelu")


# timm's networks see the padding.
_KEEP_PADDING_OUT = [
    name
    for name in filter(_has_transformer, _OF_50_LAYERS)
    if not any(part in name for part in ("swin", "convnext"))
]


@pytest.mark.parametrize("name", _slow_but_for_families(_KEEP_PADDING_OUT))
def test_predictions_of_an_image_are_the_same_alone_and_in_a_batch(name):
    torch.manual_seed(0)
    # Of 900 proposals two tie but for rounding, and those that swap ranks swap their contents.
    overrides = ["model.num_queries=30", *([] if name in FAMILIES else THIN)]
    cfg = LazyConfig.apply_overrides(get_config(name), overrides)
    model = instantiate(cfg.model).eval()
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
    with torch.device("meta"):
        model = instantiate(get_config(name).model)
    assert sum(p.numel() for p in model.parameters()) == count
