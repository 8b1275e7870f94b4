"""The loaders in real process groups of one, two and three processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dn_detr.data import CocoDetection

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, STARTS = 5, (0, 4)

# Forks the processes of each group, so that torch is imported once.
SCRIPT = """
import itertools, json, os, sys
import torch.distributed as dist
from dn_detr.data import CocoDetection, build_test_loader, build_train_loader, train_transforms

root, images, annotations, *numbers = sys.argv[1:]
iterations, *starts = map(int, numbers)

def describe(batch):
    return [(s["image_id"], s["seed"], int(s["image"].sum())) for s in batch]

def read(rank, world):
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store{world}", rank=rank, world_size=world
    )
    dataset = CocoDetection(images, annotations, train_transforms(0.1), train=True)
    train, test = {}, {}
    for workers, start in itertools.product((0, 2), starts):
        loader = build_train_loader(dataset, 4, num_workers=workers, start_iteration=start)
        batches = itertools.islice(loader, iterations)
        train[f"{workers} {start}"] = [describe(batch) for batch in batches]
    for limit in (7, 2):
        loader = build_test_loader(dataset, 2, num_workers=2, limit=limit)
        test[limit] = [s["image_id"] for batch in loader for s in batch]
    with open(f"{root}/{world}_{rank}.json", "w") as file:
        json.dump({"train": train, "test": test}, file)
    dist.barrier()
    dist.destroy_process_group()

for world in (1, 2, 3):
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                read(rank, world)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a process failed")
"""


@pytest.fixture
def outcomes(dataset: CocoDetection, tmp_path: Path) -> dict[int, list[dict[str, Any]]]:
    """What each process of the groups of each size read."""
    (tmp_path / "out").mkdir()
    paths = [str(p) for p in (tmp_path / "out", dataset.image_dir, dataset.annotation_file)]
    numbers = [str(number) for number in (ITERATIONS, *STARTS)]
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths, *numbers],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return {
        world: [
            json.loads((tmp_path / "out" / f"{world}_{rank}.json").read_text())
            for rank in range(world)
        ]
        for world in (1, 2, 3)
    }


def global_batches(ranks: list[dict[str, Any]], key: str) -> list[list[Any]]:
    """The batches of all processes together, in the order of a single process."""
    together = []
    for shares in zip(*(rank["train"][key] for rank in ranks), strict=True):
        size = sum(map(len, shares))
        together.append([shares[i % len(shares)][i // len(shares)] for i in range(size)])
    return together


@pytest.mark.slow
def test_loaders_give_the_same_to_groups_of_any_size(
    outcomes: dict[int, list[dict[str, Any]]],
) -> None:
    (alone,) = outcomes[1]
    for world, ranks in outcomes.items():
        for start in STARTS:
            for workers in (0, 2):
                batches = global_batches(ranks, f"{workers} {start}")
                assert batches == alone["train"][f"0 {start}"], (world, workers, start)
        for limit in ("7", "2"):  # with three processes and two images, one has none
            seen = Counter(image for rank in ranks for image in rank["test"][limit])
            assert seen == Counter(alone["test"][limit])
    whole, resumed = (alone["train"][f"0 {start}"] for start in STARTS)
    assert resumed[0] == whole[STARTS[1]]
    sizes = [len(rank["train"]["2 0"][0]) for rank in outcomes[3]]
    assert sizes == [2, 1, 1] and outcomes[3][2]["test"]["2"] == []
