from __future__ import annotations

import random
import resource
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from dn_detr.data import (
    CocoDetection,
    DatasetError,
    build_test_loader,
    build_train_loader,
    raise_open_file_limit,
)


def summary(batches: Any) -> list[list[tuple[Any, ...]]]:
    return [
        [
            (s["image_id"], s["seed"], s["image"].float().mean().item(), tuple(s["image"].shape),
             s["instances"].gt_boxes.tensor.tolist())
            for s in batch
        ]
        for batch in batches
    ]  # fmt: skip


def test_workers_change_nothing(dataset: CocoDetection) -> None:
    runs = [
        summary(islice(build_train_loader(dataset, 2, num_workers=workers, seed=1), 7))
        for workers in (0, 2)
    ]
    assert runs[0] == runs[1]


def test_resuming_changes_nothing(dataset: CocoDetection) -> None:
    whole = summary(islice(build_train_loader(dataset, 2, num_workers=0), 8))
    resumed = build_train_loader(dataset, 2, num_workers=0, start_iteration=5)
    assert summary(islice(resumed, 3)) == whole[5:]


@pytest.mark.parametrize("build", [build_test_loader, lambda d, **k: build_train_loader(d, 2, **k)])
def test_loading_leaves_global_random_states_alone(
    dataset: CocoDetection, build: Callable[..., Any]
) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    next(iter(build(dataset, num_workers=0)))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_epoch_length_is_known(dataset: CocoDetection) -> None:
    assert build_train_loader(dataset, 2).batch_sampler.iterations_per_epoch == 3


def test_limit_keeps_the_first_images(dataset: CocoDetection) -> None:
    train = build_train_loader(dataset, 2, num_workers=0, limit=2)
    seen = {s["image_id"] for batch in islice(train, 5) for s in batch}
    assert seen == {10, 20}
    test = build_test_loader(dataset, num_workers=0, limit=3)
    assert [s["image_id"] for batch in test for s in batch] == [10, 20, 30]


def test_limit_asks_for_a_data_set_with_subset() -> None:
    with pytest.raises(ValueError, match=r"limit=2 needs a data set with a method subset.*list"):
        build_test_loader([{}] * 4, limit=2)


def test_limit_of_nothing_is_refused(dataset: CocoDetection) -> None:
    with pytest.raises(ValueError, match="limit=0"):
        build_test_loader(dataset, limit=0)


def test_aspect_ratio_grouping_keeps_wide_and_tall_apart(dataset: CocoDetection) -> None:
    loader = build_train_loader(dataset, 2, num_workers=0, aspect_ratio_grouping=True)
    for batch in islice(loader, 30):
        assert len({s["width"] > s["height"] for s in batch}) == 1


def test_test_loader_visits_every_image_once_in_order(dataset: CocoDetection) -> None:
    loader = build_test_loader(dataset, 3, num_workers=2)
    for _ in range(2):
        batches = [[s["image_id"] for s in batch] for batch in loader]
        assert batches == [[10, 20, 30], [31, 32, 33], [34]]


def test_unreadable_image_in_a_worker_names_its_file(folder: Any) -> None:
    dataset = folder.open()
    path = folder.images_dir / "wide.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"wide\.png: cannot be read"):
        list(build_test_loader(dataset, num_workers=1))


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
