"""`dn_detr.load(...).predict(...)`: what an evaluation finds, from any kind of image."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dn_detr
from dn_detr.checkpoint import find_checkpoint, read_manifest, save_weights
from dn_detr.config import ConfigError, LazyConfig, get_config
from dn_detr.data import CocoDetection, ImageError
from dn_detr.engine import train
from dn_detr.errors import UserError
from dn_detr.predictor import Predictor
from dn_detr.structures import Instances

ORIENTATION_TAG, TURNED_RIGHT = 0x0112, 6


def write_split(root: Path, split: str) -> None:
    """Three images with a box each; the last is stored turned by 90 degrees."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for id_, (width, height) in enumerate([(70, 50), (40, 60), (80, 56)], start=1):
        image, exif = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)), None
        if id_ == 3:
            image, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
            exif[ORIENTATION_TAG] = TURNED_RIGHT
        image.save(root / split / f"{id_}.jpg", **({} if exif is None else {"exif": exif}))
        images.append({"id": id_, "file_name": f"{id_}.jpg", "width": width, "height": height})
        box = {"id": id_, "image_id": id_, "category_id": 1 + id_ % 2, "bbox": [5, 6, 20, 30]}
        annotations.append(box)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one step and its evaluation."""
    root, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    for split in ("train2017", "val2017"):
        write_split(root, split)
    overrides = [
        f"dataloader.root={root}",
        "dataloader.image_scale=0.1",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.test.batch_size=1",
        "model.num_classes=2",
        "train.device=cpu",
        "train.max_iter=1",
        f"train.output_dir={folder}",
    ]
    train(LazyConfig.apply_overrides(get_config("digits_dn_deformable_detr"), overrides))
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return dn_detr.load(run)


def test_run_of_a_package_that_is_not_trusted_names_its_config_and_the_remedy(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(find_checkpoint(run))
    config = manifest.config.replace("dn_detr.modeling.detector.Detector", "my_lab.Detector")
    monkeypatch.setattr(
        "dn_detr.predictor.read_manifest", lambda _: replace(manifest, config=config)
    )
    named = re.escape(f"{run}/config.yaml: model._target_: ")
    with pytest.raises(ConfigError, match=rf"{named}.*trust=\['my_lab'\] to dn_detr\.load"):
        dn_detr.load(run)


@pytest.fixture(scope="module")
def dataset(run: Path) -> CocoDetection:
    root = Path(LazyConfig.load(run / "config.yaml").dataloader.root)
    annotations = root / "annotations/instances_val2017.json"
    return CocoDetection(root / "val2017", annotations, train=False)


def assert_equal(first: Instances, second: Instances) -> None:
    assert first.image_size == second.image_size
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.pred_classes, second.pred_classes)


def test_predictions_are_those_of_the_evaluation_to_the_bit(
    run: Path, predictor: Predictor, dataset: CocoDetection
) -> None:
    results: list[dict[str, Any]] = json.loads((run / "eval/predictions.json").read_text())
    for index, image_id in enumerate(dataset.image_ids):
        found = predictor.predict(dataset.image_path(index))
        boxes = found.pred_boxes.tensor.double()
        boxes[:, 2:] -= boxes[:, :2].clone()
        evaluated = [result for result in results if result["image_id"] == image_id]
        assert boxes.tolist() == [result["bbox"] for result in evaluated]
        assert found.scores.double().tolist() == [result["score"] for result in evaluated]
        categories = [dataset.category_ids[class_] for class_ in found.pred_classes.tolist()]
        assert categories == [result["category_id"] for result in evaluated]


def test_classes_have_the_names_of_the_data(predictor: Predictor, dataset: CocoDetection) -> None:
    assert predictor.class_names == ["cat", "dog"]
    found = predictor.predict(dataset.image_path(0))
    names = [["cat", "dog"][class_] for class_ in found.pred_classes.tolist()]
    assert found.class_names.tolist() == names


def test_every_kind_of_image_gives_the_same(predictor: Predictor, dataset: CocoDetection) -> None:
    path = dataset.image_path(2)  # turned upright by its EXIF orientation, as the data set does it
    tensor = dataset[2]["image"]
    expected = predictor.predict(tensor)
    assert expected.image_size == (56, 80)
    array = tensor.permute(1, 2, 0).numpy()
    with Image.open(path) as image:
        for same in (path, str(path), image, Image.fromarray(array), array):
            assert_equal(predictor.predict(same), expected)


def test_a_list_of_images_gives_a_list(predictor: Predictor, dataset: CocoDetection) -> None:
    paths = [dataset.image_path(index) for index in range(3)]
    for found, path in zip(predictor.predict(list(paths)), paths, strict=True):
        assert_equal(found, predictor.predict(path))


def test_a_threshold_leaves_out_lower_scores(predictor: Predictor, dataset: CocoDetection) -> None:
    path = dataset.image_path(0)
    everything = predictor.predict(path)
    middle = everything.scores.median().item()
    found = predictor.predict(path, threshold=middle)
    assert 0 < len(found) < len(everything)
    assert len(found.class_names) == len(found) and (found.scores >= middle).all()
    assert len(predictor.predict(path, threshold=1.0).class_names) == 0


@pytest.mark.parametrize("place", ["checkpoints/last", "checkpoints/0000001"])
def test_a_checkpoint_loads_as_its_run_does(
    run: Path, predictor: Predictor, dataset: CocoDetection, place: str
) -> None:
    path = dataset.image_path(0)
    assert_equal(dn_detr.load(run / place).predict(path), predictor.predict(path))


def test_a_run_gives_its_best_checkpoint(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied, symlinks=True)
    best = copied / "checkpoints/best"
    best.unlink(missing_ok=True)
    weights = {
        name: torch.zeros_like(t) for name, t in dn_detr.load(run).model.state_dict().items()
    }
    config = (run / "config.yaml").read_text()
    save_weights(copied / "checkpoints/0000000", weights, config=config, class_names=["a", "b"])
    best.symlink_to("0000000")
    predictor = dn_detr.load(copied)
    assert predictor.class_names == ["a", "b"]
    assert not any(tensor.any() for tensor in predictor.model.state_dict().values())


def test_a_config_takes_weights_and_names(run: Path, predictor: Predictor, tmp_path: Path) -> None:
    tensors = tmp_path / "model.safetensors"
    shutil.copy(run / "checkpoints/last/model.safetensors", tensors)
    named = dn_detr.load(run / "config.yaml", tensors, class_names=["x", "y"])
    assert named.class_names == ["x", "y"]
    image = torch.zeros(3, 50, 60, dtype=torch.uint8)
    assert_equal(named.predict(image), predictor.predict(image))
    unnamed = dn_detr.load(run / "config.yaml", tensors).predict(image)
    assert set(unnamed.class_names.tolist()) <= {"class 0", "class 1"}
    assert dn_detr.load(run / "config.yaml", run).class_names == predictor.class_names


def test_weights_without_a_config_name_the_remedy(predictor: Predictor, tmp_path: Path) -> None:
    folder = save_weights(tmp_path / "weights", predictor.model.state_dict())
    with pytest.raises(UserError, match="holds weights without a config"):
        dn_detr.load(folder)


@pytest.mark.parametrize("config", ["a: 1", "model: 5", "model: {_target_: torch.nn.ReLU}"])
def test_a_config_without_a_detector_is_an_error_with_its_folder(
    tmp_path: Path, config: str
) -> None:
    save_weights(tmp_path / "run", {"w": torch.ones(1)}, config=config)
    with pytest.raises(UserError, match="run: model in its config is no detector"):
        dn_detr.load(tmp_path / "run")


def test_a_model_of_the_zoo_needs_weights() -> None:
    with pytest.raises(UserError, match=r"load\('dn_detr_r50_50ep', CHECKPOINT\)"):
        dn_detr.load("dn_detr_r50_50ep")


def test_a_run_names_no_code_that_is_not_trusted(run: Path, tmp_path: Path) -> None:
    weights = dn_detr.load(run).model.state_dict()
    config = (run / "config.yaml").read_text()
    config = config.replace("dn_detr.data.transforms.test_transforms", "my_project.transforms")
    folder = save_weights(tmp_path / "weights", weights, config=config)
    with pytest.raises(ConfigError, match="my_project"):
        dn_detr.load(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 50, 60),
        torch.zeros(50, 60, 3, dtype=torch.uint8),
        np.zeros((50, 60, 4), np.uint8),
        np.zeros((3, 50, 60), np.float32),
        {"image": "a.jpg"},
    ],
)
def test_what_is_no_image_is_refused(predictor: Predictor, wrong: Any) -> None:
    with pytest.raises(UserError, match=r"image is a path|must be"):
        predictor.predict(wrong)


def test_a_broken_file_is_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        predictor.predict(tmp_path / "broken.jpg")
