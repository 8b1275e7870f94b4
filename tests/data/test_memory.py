"""The leak guard: many batches of real JPEG files leave the memory of all processes flat."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Callable
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dn_detr.data import CocoDetection, build_train_loader, train_transforms

IMAGES = 24
WARM_UP, BATCHES = 50, 200
TOLERANCE = 4 * 2**20  # bytes; 150 batches of 4 that kept their 30 kB images would cost 18 MB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists()
        or not hasattr(ctypes.CDLL(None), "malloc_trim"),
        reason="needs Linux's account of memory and the GNU C library",
    ),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small JPEG files with two boxes each, and their annotations."""
    root = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0)
    images, annotations = [], []
    for id_ in range(1, IMAGES + 1):
        name = f"{id_}.jpg"
        Image.fromarray(pixels.integers(0, 256, (96, 128, 3), np.uint8)).save(root / name)
        images.append({"id": id_, "file_name": name, "width": 128, "height": 96})
        for box in ([8, 8, 60, 40], [30, 20, 90, 70]):
            entry = {"id": len(annotations) + 1, "image_id": id_, "category_id": 1, "bbox": box}
            annotations.append(entry)
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "noise"}]
    (root / "instances.json").write_text(json.dumps(content))
    return root


class Leaking(CocoDetection):
    """Keeps every image that it has read."""

    kept: list[Any] = []  # noqa: RUF012

    def __getitem__(self, key: Any) -> Any:
        sample = super().__getitem__(key)
        self.kept.append(sample["image"].clone())
        return sample


def resident_bytes() -> dict[str, int]:
    """Memory of this process and of its workers, without the files of programs."""
    processes = {"main": os.getpid()}
    processes.update({f"worker {c.pid}": c.pid or 0 for c in active_children() if c.daemon})
    return {name: _resident_bytes(pid) for name, pid in processes.items()}


def _resident_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    # Anon: of a page that processes share since a fork, each has its part; Shmem: tensors that
    # workers send
    sizes = [line.split()[1] for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    assert len(sizes) == 2
    return 1024 * sum(map(int, sizes))


def give_back_free_memory() -> None:
    """Leave no free memory in the heap, which a leak could fill unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def growth(
    data_set_type: Callable[..., CocoDetection],
    root: Path,
    num_workers: int,
    consume: Callable[[Any], object],
) -> dict[str, int]:
    """Bytes that each process gained between batch `WARM_UP` and batch `BATCHES`."""
    dataset = data_set_type(
        root, root / "instances.json", train_transforms(0.15), train=True, seed=0
    )
    give_back_free_memory()
    batches = iter(build_train_loader(dataset, 4, num_workers=num_workers, on_error="skip"))
    for batch in islice(batches, WARM_UP):
        consume(batch)
    give_back_free_memory()
    before = resident_bytes()
    for batch in islice(batches, BATCHES - WARM_UP):
        consume(batch)
    del batch
    give_back_free_memory()
    after = resident_bytes()
    assert after.keys() == before.keys() and len(before) == 1 + num_workers
    return {name: after[name] - before[name] for name in before}


def look_at(batch: Any) -> int:
    """Touch every page of the images."""
    return sum(int(sample["image"].sum()) for sample in batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_is_flat_over_200_batches(photographs: Path, num_workers: int) -> None:
    gained = growth(CocoDetection, photographs, num_workers, look_at)
    assert max(gained.values()) < TOLERANCE, gained


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_that_keeps_its_images_is_caught(photographs: Path, num_workers: int) -> None:
    gained = growth(Leaking, photographs, num_workers, look_at)
    Leaking.kept.clear()
    readers = [gain for name, gain in gained.items() if (name == "main") == (num_workers == 0)]
    assert min(readers) > TOLERANCE, gained


def test_a_main_process_that_keeps_its_batches_is_caught(photographs: Path) -> None:
    kept = []

    def keep(batch: Any) -> None:
        look_at(batch)
        kept.append(batch)

    gained = growth(CocoDetection, photographs, 2, keep)
    assert gained["main"] > TOLERANCE, gained
