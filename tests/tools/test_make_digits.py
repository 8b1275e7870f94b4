from __future__ import annotations

import builtins
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tools import make_digits

datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra `demo`")

write_digits_dataset = make_digits.write_digits_dataset
SMALL = {"num_train": 12, "num_val": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_dataset(tmp_path_factory.mktemp("digits") / "small", **SMALL)


def annotations_of(root: Path, split: str = "train2017") -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def digits_per_image(root: Path) -> Counter[int]:
    return Counter(annotation["image_id"] for annotation in annotations_of(root)["annotations"])


def test_pycocotools_reads_every_split(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train2017", 12), ("val2017", 4)):
        coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        assert len(coco.getImgIds()) == count
        assert [coco.cats[i]["name"] for i in sorted(coco.cats)] == [str(d) for d in range(10)]
        assert sorted(coco.cats) == list(range(1, 11))


def test_images_are_jpeg_of_the_size_that_the_json_says(root: Path) -> None:
    for entry in annotations_of(root)["images"]:
        with Image.open(root / "train2017" / entry["file_name"]) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == (entry["width"], entry["height"]) == (128, 128)


def test_annotation_ids_are_unique_and_never_zero(root: Path) -> None:
    ids = [annotation["id"] for annotation in annotations_of(root)["annotations"]]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0


def test_same_seed_gives_identical_bytes(root: Path, tmp_path: Path) -> None:
    assert digests(write_digits_dataset(tmp_path / "again", **SMALL)) == digests(root)


def test_another_seed_gives_other_images(root: Path, tmp_path: Path) -> None:
    other = write_digits_dataset(tmp_path / "other", **SMALL, seed=1)
    first = "train2017/000000000001.jpg"
    assert digests(other)[first] != digests(root)[first]
    assert digits_per_image(other) != digits_per_image(root)  # not only the choice of scans


def test_first_images_do_not_depend_on_how_many_follow(root: Path, tmp_path: Path) -> None:
    few = digests(write_digits_dataset(tmp_path / "few", num_train=3, num_val=4))
    images = {name: digest for name, digest in few.items() if name.startswith("train2017/")}
    assert len(images) == 3
    assert images.items() <= digests(root).items()


def test_same_settings_reuse_the_files(tmp_path: Path) -> None:
    root = write_digits_dataset(tmp_path / "digits", num_train=1, num_val=1)
    image = root / "train2017" / "000000000001.jpg"
    before = image.stat()
    write_digits_dataset(root, num_train=1, num_val=1)
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_other_settings_replace_the_whole_folder(tmp_path: Path) -> None:
    write_digits_dataset(tmp_path / "digits", num_train=3, num_val=1)
    root = write_digits_dataset(tmp_path / "digits", num_train=2, num_val=1, image_size=96)
    assert len(list((root / "train2017").iterdir())) == 2
    assert annotations_of(root)["images"][0]["width"] == 96
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]  # nothing left beside it


def test_failure_leaves_the_old_data_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_digits_dataset(tmp_path / "digits", num_train=1, num_val=1)
    before = digests(root)

    def full_disk(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(make_digits, "_write_split", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_digits_dataset(root, num_train=2, num_val=1)
    assert digests(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a digits data set"):
        write_digits_dataset(tmp_path, num_train=1, num_val=1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_no_scan_is_in_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[bytes]] = []
    draw_scene = make_digits.draw_scene

    def record(recipe: Any, scans: Any, photos: Any, rng: Any) -> Any:
        seen.append({ink.tobytes() for ink in scans.ink})
        return draw_scene(recipe, scans, photos, rng)

    monkeypatch.setattr(make_digits, "draw_scene", record)
    write_digits_dataset(tmp_path / "digits", num_train=1, num_val=1)
    train, val = seen
    assert not train & val
    assert len(train | val) == len(datasets.load_digits().images)


@pytest.fixture(scope="module")
def scans() -> Any:
    return make_digits._load_scans()


@pytest.mark.parametrize("seed", range(10))
def test_boxes_are_tight_around_the_ink(scans: Any, seed: int) -> None:
    recipe = make_digits.SceneRecipe(digits_per_image=(1, 1))
    black, gray = Image.new("RGB", (200, 200), (0, 0, 0)), (70, 70, 70)
    photos = [Image.new("RGB", black.size, gray)]
    scene = make_digits.draw_scene(recipe, scans, photos, np.random.default_rng(seed))
    changed = (np.asarray(scene.image).astype(int) - 70).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    drawn = (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert [tuple(map(int, drawn))] == scene.boxes_xywh


@pytest.mark.parametrize("seed", range(10))
def test_boxes_overlap_at_most_as_asked_and_lie_in_the_image(scans: Any, seed: int) -> None:
    recipe = make_digits.SceneRecipe(digits_per_image=(8, 8), max_overlap=0.1)
    photos = make_digits._load_photos()
    scene = make_digits.draw_scene(recipe, scans, photos, np.random.default_rng(seed))
    covered = np.zeros((len(scene.labels), 128, 128), dtype=bool)
    for mask, (x, y, width, height) in zip(covered, scene.boxes_xywh, strict=True):
        mask[y : y + height, x : x + width] = True
        assert mask.sum() == width * height  # nothing was cut off at the rim
    for i, a in enumerate(covered):
        for b in covered[:i]:
            assert (a & b).sum() <= 0.1 * min(a.sum(), b.sum())


def test_labels_name_the_pasted_scans(scans: Any) -> None:
    recipe = make_digits.SceneRecipe(digits_per_image=(3, 3))
    sevens = scans[np.flatnonzero(scans.labels == 7)]
    photos = make_digits._load_photos()
    scene = make_digits.draw_scene(recipe, sevens, photos, np.random.default_rng(0))
    assert set(scene.labels) == {7}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train": 0},
        {"digits_per_image": (0, 3)},
        {"digits_per_image": (4, 3)},
        {"digit_size": (4, 20)},
        {"digit_size": (20, 65)},
        {"max_overlap": 1.0},
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        write_digits_dataset(tmp_path / "digits", **settings)
    assert not list(tmp_path.iterdir())


def test_missing_scikit_learn_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError(name)
        return real_import(name, *args)

    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r"pip install 'dn_detr\[demo\]'"):
        write_digits_dataset(tmp_path / "digits", num_train=1, num_val=1)


def test_the_command_passes_its_options_on(tmp_path: Path) -> None:
    few = ["--num-train", "1", "--num-val", "2"]
    options = ["--image-size", "64", "--digits-per-image", "2", "2", "--digit-size", "10", "12"]
    root = tmp_path / "digits"
    assert make_digits.main(["--root", str(root), *few, *options]) == 0
    content = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    assert content["images"][0]["width"] == 64
    assert len(content["annotations"]) == 2


def test_the_command_reports_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_digits.main(["--root", str(tmp_path / "digits"), "--max-overlap", "2"]) == 1
    assert "max_overlap=2.0" in capsys.readouterr().err
