"""Broken image files in a training run: an error, or replaced by other images of the data set."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch

from dn_detr.data import (
    CocoDetection,
    DatasetError,
    ImageError,
    SkipBrokenImages,
    build_test_loader,
    build_train_loader,
    count_skipped,
    describe_skipped,
    stable_seed,
)


def cut(dataset: CocoDetection, *indices: int) -> list[str]:
    """Truncate the files of these images; their paths."""
    paths = [dataset.image_path(index) for index in indices]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return [str(path) for path in paths]


def read(dataset: CocoDetection, iterations: int = 7, **settings: Any) -> list[Any]:
    loader = build_train_loader(dataset, 2, seed=1, **settings)
    return [
        [(s["image_id"], s["seed"], s["image"].tolist(), s.get("skipped_files")) for s in batch]
        for batch in islice(loader, iterations)
    ]


def test_a_broken_image_is_an_error_unless_asked_otherwise(dataset: CocoDetection) -> None:
    (path,) = cut(dataset, 3)
    with pytest.raises(ImageError, match=path):
        read(dataset, num_workers=0)


def test_a_broken_image_is_replaced_and_named(dataset: CocoDetection) -> None:
    (path,) = cut(dataset, 3)
    batches = [s for batch in read(dataset, 21, num_workers=0, on_error="skip") for s in batch]
    assert dataset.image_ids[3] not in {image_id for image_id, *_ in batches}
    replaced = [skipped for *_, skipped in batches if skipped]
    assert replaced and set(map(tuple, replaced)) == {(path,)}
    assert len(batches) == 42


def test_a_file_that_vanishes_after_the_start_is_skipped_too(dataset: CocoDetection) -> None:
    dataset.image_path(2).unlink()
    samples = [s for batch in read(dataset, 6, num_workers=0, on_error="skip") for s in batch]
    assert any(skipped == [str(dataset.image_path(2))] for *_, skipped in samples)


def test_intact_samples_are_the_same_with_and_without_skipping(dataset: CocoDetection) -> None:
    assert read(dataset, num_workers=0, on_error="skip") == read(dataset, num_workers=0)


def test_workers_and_resuming_do_not_change_what_is_taken_instead(dataset: CocoDetection) -> None:
    cut(dataset, 1, 4, 5)
    whole = read(dataset, 9, num_workers=0, on_error="skip")
    assert read(dataset, 9, num_workers=2, on_error="skip") == whole
    resumed = read(dataset, 4, num_workers=0, on_error="skip", start_iteration=5)
    assert resumed == whole[5:]


def test_the_replacement_is_a_function_of_seed_epoch_index_and_attempt(
    dataset: CocoDetection,
) -> None:
    broken = [0, 1, 2, 3, 4]
    cut(dataset, *broken)
    for epoch in range(5):
        chosen = [3]
        while chosen[-1] in broken:
            chosen.append(stable_seed(8, epoch, 3, len(chosen)) % 7)
        sample = SkipBrokenImages(dataset, seed=8)[epoch, 3]
        assert sample["skipped_files"] == [str(dataset.image_path(i)) for i in chosen[:-1]]
        expected = dataset[epoch, chosen[-1]]
        assert sample["image_id"] == expected["image_id"]
        assert torch.equal(sample["image"], expected["image"])


def test_a_data_set_that_is_broken_as_a_whole_is_an_error(dataset: CocoDetection) -> None:
    cut(dataset, *range(7))
    with pytest.raises(DatasetError, match="11 image files in a row") as caught:
        read(dataset, 1, num_workers=0, on_error="skip")
    assert not isinstance(caught.value, ImageError)


class Mistaken(CocoDetection):
    """Its annotations are at fault, not an image."""

    def __getitem__(self, key: Any) -> Any:
        raise DatasetError("the annotation of image 3 is wrong")


def test_nothing_but_unreadable_images_is_skipped(folder: Any) -> None:
    folder.open()
    dataset = Mistaken(folder.images_dir, folder.annotation_file, train=True)
    with pytest.raises(DatasetError, match=r"^the annotation of image 3"):
        next(iter(build_train_loader(dataset, 2, num_workers=0, on_error="skip")))


def test_an_evaluation_never_skips(dataset: CocoDetection) -> None:
    (path,) = cut(dataset, 3)
    with pytest.raises(ImageError, match=path):
        list(build_test_loader(dataset, num_workers=1))


def test_a_loader_that_skips_has_the_data_set_that_it_was_given(dataset: CocoDetection) -> None:
    assert build_train_loader(dataset, 2, on_error="skip").dataset is dataset


def test_other_words_than_raise_and_skip_are_refused(dataset: CocoDetection) -> None:
    with pytest.raises(ValueError, match=r"on_error='ignore': expected raise or skip"):
        build_train_loader(dataset, 2, on_error="ignore")  # type: ignore[arg-type]


def test_skipped_files_of_batches_and_processes_add_up() -> None:
    first = count_skipped([{"skipped_files": ["a.jpg", "b.jpg"]}, {}])
    second = count_skipped([{"skipped_files": ["b.jpg"]}])
    assert first + second == Counter({"b.jpg": 2, "a.jpg": 1})
    message = describe_skipped(first + second)
    assert "3 images" in message and "2 files" in message
    assert message.splitlines()[1:] == ["  a.jpg (1 x)", "  b.jpg (2 x)"]
    assert describe_skipped({}) == ""
