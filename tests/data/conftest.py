from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dn_detr.data import CocoDetection, train_transforms


@pytest.fixture
def shared() -> Path:
    """Reference data that lies beside the checkout where the project is developed."""
    folder = Path(__file__).resolve().parents[3] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference data in ../shared, which is not part of the project")
    return folder


class CocoFolder:
    """A small data set in COCO's format, to be changed by a test before it is opened."""

    def __init__(self, root: Path) -> None:
        self.images_dir = root / "images"
        self.annotation_file = root / "instances.json"
        self.images_dir.mkdir()
        self.content: dict[str, Any] = {
            "images": [
                {"id": 20, "file_name": "wide.png", "width": 40, "height": 30},
                {"id": 10, "file_name": "tall.png", "width": 20, "height": 50},
            ],
            "annotations": [
                {"id": 1, "image_id": 20, "category_id": 7, "bbox": [5, 6, 10, 12]},
                {"id": 2, "image_id": 20, "category_id": 3, "bbox": [0, 0, 40, 30]},
                {"id": 3, "image_id": 10, "category_id": 3, "bbox": [2, 4, 8, 16]},
            ],
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        }
        for annotation in self.annotations:
            annotation.update(area=annotation["bbox"][2] * annotation["bbox"][3], iscrowd=0)
        for number, image in enumerate(self.images):
            size = (image["width"], image["height"])
            Image.new("RGB", size, (50, 100, 90 * number)).save(
                self.images_dir / image["file_name"]
            )

    @property
    def images(self) -> list[dict[str, Any]]:
        return self.content["images"]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.content["annotations"]

    def annotate(self, id_: int, bbox: list[Any], image_id: int = 10, **more: Any) -> None:
        entry = {"id": id_, "image_id": image_id, "category_id": 3, "bbox": bbox, **more}
        self.annotations.append(entry)

    def open(self, *, train: bool = True, **settings: Any) -> CocoDetection:
        self.annotation_file.write_text(json.dumps(self.content))
        return CocoDetection(self.images_dir, self.annotation_file, train=train, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[str], CocoFolder]:
    def make(name: str) -> CocoFolder:
        (tmp_path / name).mkdir()
        return CocoFolder(tmp_path / name)

    return make


@pytest.fixture
def dataset(folder: Any) -> CocoDetection:
    """Seven images, three of them tall."""
    for id_ in range(30, 35):
        width, height = (20, 30) if id_ < 32 else (30, 20)
        folder.images.append(
            {"id": id_, "file_name": f"{id_}.png", "width": width, "height": height}
        )
        Image.new("RGB", (width, height), (id_, 0, 0)).save(folder.images_dir / f"{id_}.png")
    return folder.open(transforms=train_transforms(0.1), seed=3)
