"""Which row of a file's class head each class of the model takes."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import CheckpointError
from dn_detr.checkpoint.class_rows import choose_rows, copy_rows
from dn_detr.checkpoint.coco_classes import COCO_CATEGORIES, COCO_IDS, COCO_NAMES


def test_coco_has_eighty_of_the_ids_up_to_ninety():
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert sorted(COCO_IDS) == [i for i in range(1, 91) if i not in gaps]
    assert len(set(COCO_NAMES)) == 80


def test_the_names_are_those_of_the_annotations(shared):
    import json

    file = shared / "data/coco_mini/annotations/instances_val2017.json"
    categories = json.loads(file.read_text())["categories"]
    assert {c["id"]: c["name"] for c in categories} == COCO_CATEGORIES


@pytest.mark.parametrize("class_names", [(), COCO_NAMES])
def test_rows_by_category_id_become_the_eighty_classes(class_names):
    rows = choose_rows(80, 91, class_names=class_names, file_is_coco=True)
    assert rows.rows == COCO_IDS and rows.mapped == COCO_NAMES


def test_rows_by_category_id_stay_when_the_model_has_as_many():
    assert choose_rows(91, 91, file_is_coco=True).is_identity


def test_a_model_by_category_id_on_contiguous_data_is_an_error():
    with pytest.raises(CheckpointError, match=r"model\.num_classes=80"):
        choose_rows(91, 91, class_names=COCO_NAMES, file_is_coco=True)


def test_classes_are_found_by_name():
    names = ["dog", "zebra crossing", "Person"]
    rows = choose_rows(3, 91, class_names=names, file_is_coco=True, fine_tune=True)
    assert rows.rows == (18, -1, 1) and rows.mapped == ("dog", "Person")
    assert rows.note == (
        "2 of 3 classes take their rows by name (dog, Person); the others are re-initialised "
        "(zebra crossing)"
    )


def test_equal_counts_with_other_names_follow_the_names():
    rows = choose_rows(2, 2, class_names=["cat", "dog"], file_names=["dog", "cat"], fine_tune=True)
    assert rows.rows == (1, 0) and not rows.is_identity


@pytest.mark.parametrize("names", [["cat", "dog"], ["dog", "bird"]])
def test_other_names_are_an_error_where_nothing_is_trained(names):
    with pytest.raises(CheckpointError, match=r"class [01] was '(dog|cat)' and now is"):
        choose_rows(2, 2, class_names=names, file_names=["dog", "cat"])


def test_the_same_names_are_the_identity_unnamed_classes_included():
    assert choose_rows(3, 3, class_names=["dog", "cat"], file_names=["dog", "cat"]).is_identity


@pytest.mark.parametrize("file_names", [(), ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_without_names_another_count_is_re_initialised(file_names):
    rows = choose_rows(2, 3, class_names=["a", "b"], file_names=file_names, fine_tune=True)
    assert rows.rows == (-1, -1) and rows.mapped == ()
    with pytest.raises(CheckpointError, match=r"the file has 3 classes .*, the data 2"):
        choose_rows(2, 3, class_names=["a", "b"], file_names=file_names)


def test_without_names_an_equal_count_is_the_identity():
    assert choose_rows(3, 3).is_identity
    assert choose_rows(80, 80, class_names=[f"part {i}" for i in range(80)]).is_identity


def test_the_row_of_no_object_is_copied_as_it_is():
    rows = choose_rows(2, 3, class_names=["c", "x"], file_names=["a", "b", "c"], fine_tune=True)
    target, value = torch.zeros(3, 1), torch.arange(1.0, 5.0)[:, None]
    pairs = rows.source_of(target, value)
    assert pairs is not None
    copy_rows(target, value, pairs)
    assert target.flatten().tolist() == [3.0, 0.0, 4.0]


def test_tensors_of_other_shapes_are_not_copied_by_row():
    rows = choose_rows(2, 3, fine_tune=True)
    assert rows.source_of(torch.zeros(2, 4), torch.zeros(3, 5)) is None
    assert rows.source_of(torch.zeros(2, 4), torch.zeros(4, 4)) is None
