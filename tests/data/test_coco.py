from __future__ import annotations

import json
import logging
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dn_detr.data import (
    CocoDetection,
    DatasetError,
    check_num_classes,
    check_same_categories,
    train_transforms,
)
from dn_detr.data import test_transforms as build_test_transforms


def test_sample_follows_the_protocol(folder: Any) -> None:
    sample = folder.open(transforms=build_test_transforms(short_side=60))[1]
    assert sample["image"].dtype == torch.uint8
    assert tuple(sample["image"].shape) == (3, 60, 80)
    assert sample["image"][:, 0, 0].tolist() == [50, 100, 0]
    assert (sample["height"], sample["width"], sample["image_id"]) == (30, 40, 20)
    assert sample["file_name"] == str(folder.images_dir / "wide.png")
    instances = sample["instances"]
    assert instances.image_size == (60, 80)
    assert instances.gt_boxes.tensor.tolist() == [[10, 12, 30, 36], [0, 0, 80, 60]]
    assert instances.gt_classes.tolist() == [1, 0] and instances.gt_classes.dtype == torch.int64


def test_evaluation_samples_carry_no_ground_truth(folder: Any) -> None:
    assert "instances" not in folder.open(train=False)[0]


def test_classes_are_contiguous_in_order_of_category_id(folder: Any) -> None:
    dataset = folder.open()
    assert dataset.category_ids == [3, 7]
    assert dataset.class_names == ["dog", "cat"]


def test_images_are_in_order_of_id(folder: Any) -> None:
    dataset = folder.open()
    assert dataset.image_ids == [10, 20]
    assert [dataset[i]["image_id"] for i in range(len(dataset))] == [10, 20]


def test_images_without_boxes_are_kept(folder: Any) -> None:
    folder.content["annotations"] = folder.annotations[:2]
    sample = folder.open()[0]
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)
    assert sample["instances"].gt_classes.shape == (0,)


def test_crowd_regions_never_train_but_reach_the_evaluator(folder: Any) -> None:
    folder.annotations[1]["iscrowd"] = 1
    dataset = folder.open()
    assert dataset[1]["instances"].gt_classes.tolist() == [1]
    assert dataset.report.crowd_boxes == 1
    assert dataset.coco.anns[2]["iscrowd"] == 1


def test_boxes_over_the_border_are_clipped(folder: Any) -> None:
    folder.annotate(9, [-5, 40, 15, 30.5])
    dataset = folder.open()
    assert dataset[0]["instances"].gt_boxes.tensor.tolist()[-1] == [0, 40, 10, 50]
    assert dataset.report.clipped_boxes == 1


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([3, 3, 0, 5], "empty_boxes"),
        ([3, 3, 5, 0], "empty_boxes"),
        ([3, 3, -5, 5], "empty_boxes"),
        ([15, 15, -5, -5], "empty_boxes"),
        ([20, 0, 5, 5], "outside_boxes"),
        ([0, 50, 5, 5], "outside_boxes"),
        ([-9, 0, 9, 5], "outside_boxes"),
        ([3, -60, 5, 5], "outside_boxes"),
    ],
)
def test_boxes_that_cannot_be_trained_on_are_counted_skips(
    folder: Any, caplog: pytest.LogCaptureFixture, bbox: list[float], reason: str
) -> None:
    folder.annotate(77, bbox)
    dataset = folder.open()
    assert len(dataset[0]["instances"]) == 1
    assert getattr(dataset.report, reason) == (77,)
    assert dataset.report.boxes == 3
    assert [("1 boxes" in r.message, "77" in r.message) for r in caplog.records] == [(True, True)]


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda x, y, w, h: [x / 100, y / 100, w / 100, h / 100], "relative numbers"),
        (lambda x, y, w, h: [x, y, w + 40, h], "3 of 3 boxes .* corners"),
    ],
)
def test_boxes_in_another_unit_are_doubted(
    folder: Any, caplog: pytest.LogCaptureFixture, change: Any, doubt: str
) -> None:
    for annotation in folder.annotations:
        annotation["bbox"] = change(*annotation["bbox"])
    folder.open()
    assert re.search(f"{doubt}.*; boxes have to be \\[x, y, width, height\\] in pix", caplog.text)


def test_clean_data_are_opened_silently(
    folder: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.open()
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_missing_area_and_iscrowd_are_filled(folder: Any) -> None:
    folder.annotate(9, [1, 1, 4, 5])
    dataset = folder.open()
    assert (dataset.coco.anns[9]["area"], dataset.coco.anns[9]["iscrowd"]) == (20, 0)


def test_annotation_id_zero_renumbers_all_from_one(folder: Any) -> None:
    folder.annotations[1]["id"] = 0
    dataset = folder.open()
    assert sorted(dataset.coco.anns) == [1, 2, 3]
    assert dataset.report.renumbered


def spoil(section: str, entry: int, **changes: Any) -> Callable[[Any], None]:
    return lambda folder: folder.content[section][entry].update(changes)


def lose(section: str, entry: int, key: str) -> Callable[[Any], None]:
    return lambda folder: folder.content[section][entry].pop(key)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.content.pop("annotations"), "no list under annotations"),
        (lambda f: f.content.update(categories={}), "no list under categories"),
        (lambda f: f.content.update(images=[]), "'images' is empty"),
        (lambda f: f.content.update(categories=[]), "'categories' is empty"),
        (lambda f: f.images.append(3), "entry 2 is no object"),
        (spoil("images", 1, id=20), "duplicate ids in 'images': 20"),
        (spoil("annotations", 2, id=1), "duplicate ids in 'annotations': 1"),
        (spoil("categories", 1, id=7), "duplicate ids in 'categories': 7"),
        (spoil("images", 1, id="10"), "no integers of 64 bits: '10'"),
        (spoil("images", 1, id=2**63), f"no integers of 64 bits: {2**63}"),
        (spoil("categories", 0, id=-(2**63) - 1), f"no integers of 64 bits: {-(2**63) - 1}"),
        (spoil("images", 1, id=10**4000), "no integers of 64 bits: 1000"),
        (spoil("annotations", 2, category_id=4), "unknown category_id: 3 (category_id 4)"),
        (spoil("annotations", 2, category_id=None), "unknown category_id: 3 (category_id None)"),
        (spoil("annotations", 2, image_id=11), "unknown image_id: 3 (image_id 11)"),
        (spoil("annotations", 2, bbox=[1, 2, NAN, 4]), "four finite numbers: 3 ("),
        (spoil("annotations", 2, bbox=[1, 2, 3, INF]), "four finite numbers: 3 ("),
        (spoil("annotations", 2, bbox=[1, 2, 3, 10**400]), "four finite numbers: 3 ("),
        (spoil("annotations", 2, bbox=[1, 2, 3]), "four finite numbers: 3 ("),
        (spoil("annotations", 2, bbox=[1, 2, 3, "4"]), "four finite numbers: 3 ("),
        (spoil("annotations", 2, bbox=None), "four finite numbers: 3 ("),
        (spoil("annotations", 2, area=NAN), "area is no number from 0 to 1e10: 3 (nan)"),
        (spoil("annotations", 2, area=-1), "area is no number from 0 to 1e10: 3 (-1)"),
        (spoil("annotations", 2, area=1.1e10), "area is no number from 0 to 1e10: 3 (11"),
        (spoil("annotations", 2, iscrowd="no"), "iscrowd is not 0 or 1: 3 ('no')"),
        (lose("annotations", 2, "bbox"), "entry 2 (id 3) lacks bbox"),
        (lose("annotations", 2, "id"), "entry 2 (id None) lacks id"),
        (lose("images", 0, "width"), "entry 0 (id 20) lacks width"),
        (lose("categories", 0, "name"), "entry 0 (id 7) lacks name"),
        (spoil("images", 0, height=0), "no positive integer: 20"),
        (spoil("images", 0, width=10**400), "no positive integer: 20"),
        (
            spoil("images", 0, file_name=""),
            "with control characters in it: 20",
        ),
        (spoil("images", 0, file_name="a\x1b[2J.jpg"), "with control characters in it: 20"),
        (spoil("images", 0, file_name="a/" * 3000 + "b"), "1 of 2 image files are missing: a/a/"),
        (spoil("categories", 0, name=""), "with control characters in it: 7"),
        (
            spoil("categories", 0, name="\x9b31mcat"),
            "with control characters in it: 7",
        ),
        (spoil("categories", 0, name="dog"), "share a name: 7 ('dog'), 3 ('dog')"),
    ],
)
def test_wrong_annotation_file_is_refused_with_file_and_id(
    folder: Any, damage: Callable[[Any], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(DatasetError, match=re.escape(message)) as error:
        folder.open()
    message = str(error.value)
    assert str(folder.annotation_file) in message or str(folder.images_dir) in message
    assert len(message) < 1000 and message.isprintable()


def test_the_area_of_a_huge_box_is_one_that_the_evaluation_counts(folder: Any) -> None:
    folder.annotate(9, [0, 0, 1e8, 1e8])
    assert folder.open().coco.anns[9]["area"] == 1e10


def test_many_offenders_are_counted_and_the_first_named(folder: Any) -> None:
    for id_ in range(100, 120):
        folder.annotate(id_, [NAN] * 4)
    with pytest.raises(DatasetError, match=r"20 annotations .*100 .*104 .* and 15 more"):
        folder.open()


def test_json_syntax_error_names_the_line(folder: Any) -> None:
    folder.annotation_file.write_text('{"images": [],\n"annotations": [}\n')
    with pytest.raises(DatasetError, match=r"instances\.json, line 2, column 17"):
        CocoDetection(folder.images_dir, folder.annotation_file, train=True)


def test_json_that_is_no_text_is_refused(folder: Any) -> None:
    folder.annotation_file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DatasetError, match=r"instances\.json: not a JSON text"):
        CocoDetection(folder.images_dir, folder.annotation_file, train=True)


def test_json_of_another_kind_is_refused(folder: Any) -> None:
    folder.annotation_file.write_text("[1, 2]")
    with pytest.raises(DatasetError, match=r"this file holds a list"):
        CocoDetection(folder.images_dir, folder.annotation_file, train=True)


def test_missing_data_set_says_what_was_tried_and_what_helps(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        CocoDetection(tmp_path / "train2017", tmp_path / "annotations/a.json", train=True)
    for part in (
        f"{tmp_path}/train2017: no such directory",
        f"{tmp_path}/annotations/a.json: no such file",
        "dataloader.root=",
        "COCO_ROOT",
        "make demo",
        "configs/digits_dn_deformable_detr.py",
    ):
        assert part in str(error.value)


def test_missing_image_files_are_counted_and_named(folder: Any) -> None:
    (folder.images_dir / "wide.png").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 image files are missing: wide\.png"):
        folder.open()


def test_image_files_may_lie_in_subfolders(folder: Any) -> None:
    (folder.images_dir / "a").mkdir()
    (folder.images_dir / "wide.png").rename(folder.images_dir / "a/wide.png")
    folder.images[0]["file_name"] = "a/wide.png"
    assert folder.open()[1]["image"].shape == (3, 30, 40)
    folder.images[1]["file_name"] = "b/tall.png"
    with pytest.raises(DatasetError, match=r"b/tall\.png"):
        folder.open()


def test_image_of_another_size_than_annotated_is_refused(folder: Any) -> None:
    Image.new("RGB", (41, 30)).save(folder.images_dir / "wide.png")
    with pytest.raises(DatasetError, match=r"wide\.png: the image is 41x30"):
        folder.open()[1]


@pytest.mark.parametrize("bbox", [None, [0, 0, 0, 0]])
def test_training_without_any_box_is_refused(folder: Any, bbox: list[int] | None) -> None:
    folder.content["annotations"] = []
    if bbox is not None:
        folder.annotate(1, bbox)
    with pytest.raises(DatasetError, match="no box to train on"):
        folder.open(train=True)


def test_evaluation_without_annotations_warns(
    folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder.content["annotations"] = []
    folder.open(train=False)
    assert "-1" in caplog.text


def test_draws_are_a_function_of_seed_epoch_and_index(folder: Any) -> None:
    recipe = train_transforms(0.1)
    dataset = folder.open(transforms=recipe, seed=1)
    keys = [(epoch, index) for epoch in range(6) for index in range(2)]
    first = {key: dataset[key] for key in keys}
    random.shuffle(keys)
    for key in keys:
        again = dataset[key]
        assert again["seed"] == first[key]["seed"]
        assert torch.equal(again["image"], first[key]["image"])
    other = folder.open(transforms=recipe, seed=2)
    seeds = [s["seed"] for s in first.values()] + [other[key]["seed"] for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert len({tuple(first[epoch, 1]["image"].shape) for epoch in range(6)}) > 1


def test_an_index_alone_means_epoch_zero(folder: Any) -> None:
    dataset = folder.open()
    assert dataset[1]["seed"] == dataset[0, 1]["seed"] != dataset[1, 1]["seed"]


def without_first(sample: Any, rng: random.Random) -> Any:
    """As a crop that cuts the first object off."""
    sample["instances"].gt_boxes = sample["instances"].gt_boxes * torch.tensor([[0.0], [1.0]])
    return sample


def test_cropped_out_boxes_lose_their_classes_too(folder: Any) -> None:
    instances = folder.open(transforms=without_first)[1]["instances"]
    assert instances.gt_classes.tolist() == [0]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 40, 30]]


def test_objects_are_known_again_by_their_row_in_the_table_of_all_boxes(folder: Any) -> None:
    dataset = folder.open(transforms=train_transforms(0.1))
    assert dataset.num_boxes == 3
    for epoch in range(20):
        tall, wide = (dataset[epoch, index]["instances"] for index in range(2))
        assert set(tall.gt_ids.tolist()) <= {0} and set(wide.gt_ids.tolist()) <= {1, 2}
        assert wide.gt_ids.dtype == torch.int64
        # of the wide image's objects the first is a cat, the second a dog
        assert [2 - id_ for id_ in wide.gt_ids.tolist()] == wide.gt_classes.tolist()


def test_ids_of_objects_are_in_step_with_boxes_that_a_crop_leaves(folder: Any) -> None:
    assert folder.open(transforms=without_first)[1]["instances"].gt_ids.tolist() == [2]


def test_a_subset_has_the_ids_of_the_whole_for_the_images_that_it_keeps(folder: Any) -> None:
    folder.annotate(9, [1, 1, 4, 5])
    dataset = folder.open()
    part = dataset.subset(1)
    assert (dataset.num_boxes, part.num_boxes) == (4, 2)
    assert part[0]["instances"].gt_ids.tolist() == [0, 1]
    assert part[0]["instances"].gt_ids.tolist() == dataset[0]["instances"].gt_ids.tolist()


def test_images_without_boxes_have_no_ids(folder: Any) -> None:
    folder.content["annotations"] = folder.annotations[:2]
    ids = folder.open()[0]["instances"].gt_ids
    assert ids.shape == (0,) and ids.dtype == torch.int64


def test_transform_that_works_in_place_does_not_change_the_data_set(folder: Any) -> None:
    def halve(sample: Any, rng: random.Random) -> Any:
        sample["instances"].gt_boxes.mul_(0.5)
        return sample

    dataset = folder.open(transforms=halve)
    first, second = (dataset[1]["instances"].gt_boxes.tensor for _ in range(2))
    assert torch.equal(first, second)


def test_data_set_can_be_sent_to_another_process(folder: Any) -> None:
    dataset = folder.open(transforms=train_transforms(0.1))
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied[2, 1]["image"], dataset[2, 1]["image"])


def test_subset_keeps_the_first_images_only(folder: Any) -> None:
    dataset = folder.open()
    part = dataset.subset(1)
    assert (len(part), part.image_ids, len(dataset)) == (1, [10], 2)
    assert dataset.subset(99).image_ids == dataset.image_ids
    with pytest.raises(ValueError, match="limit=-1"):
        dataset.subset(-1)


def test_more_classes_than_the_model_is_refused_with_the_remedy(folder: Any) -> None:
    with pytest.raises(DatasetError, match=r"2 classes.*model\.num_classes=2"):
        check_num_classes(folder.open(), 1)


def test_fewer_classes_than_the_model_warn_once(
    folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    check_num_classes(folder.open(), 2)
    assert not caplog.records
    check_num_classes(folder.open(), 5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_data_sets_with_other_categories_are_refused(make_folder: Any) -> None:
    train, test = make_folder("train"), make_folder("test")
    check_same_categories(train.open(), test.open(train=False))
    test.content["categories"].append({"id": 5, "name": "bird"})
    with pytest.raises(DatasetError, match="bird"):
        check_same_categories(train.open(), test.open(train=False))


def test_coco_annotations_equal_a_plain_reading_of_the_json(shared: Path) -> None:
    root = shared / "data/coco_mini"
    file = root / "annotations/instances_train2017.json"
    dataset = CocoDetection(root / "train2017", file, train=True)
    content = json.loads(file.read_text())
    ids = sorted(category["id"] for category in content["categories"])
    for index in (0, 1, 50, 127):
        sample = dataset[index]
        expected = [
            (ids.index(a["category_id"]), a["bbox"][0], a["bbox"][1] + a["bbox"][3])
            for a in content["annotations"]
            if a["image_id"] == sample["image_id"] and not a["iscrowd"]
        ]
        boxes = sample["instances"].gt_boxes.tensor
        assert sample["instances"].gt_classes.tolist() == [class_ for class_, _, _ in expected]
        np.testing.assert_allclose(boxes[:, 0], [x for _, x, _ in expected], rtol=1e-6)
        np.testing.assert_allclose(boxes[:, 3], [y for _, _, y in expected], rtol=1e-6)


def test_box_rules_equal_the_reference(folder: Any, shared: Path) -> None:
    golden = np.load(shared / "golden/official/official_transforms.npz")
    case = json.loads(str(golden["meta"]))["convert"]
    width, height = case["image_wh"]
    Image.new("RGB", (width, height)).save(folder.images_dir / "reference.png")
    folder.content["images"] = [
        {"id": 42, "file_name": "reference.png", "width": width, "height": height}
    ]
    folder.content["annotations"] = [
        {**annotation, "id": number, "image_id": 42}
        for number, annotation in enumerate(case["annotations"], start=1)
    ]
    folder.content["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 7)]
    instances = folder.open()[0]["instances"]
    assert instances.gt_boxes.tensor.tolist() == case["result"]["boxes"]
    assert (instances.gt_classes + 1).tolist() == case["result"]["labels"]


coordinates = st.floats(-1e6, 1e6, allow_nan=False) | st.integers(-60, 60)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(boxes=st.lists(st.tuples(*[coordinates] * 4), max_size=8))
def test_every_box_is_trained_on_or_counted(folder: Any, boxes: list[tuple[float, ...]]) -> None:
    kept = [a for a in folder.annotations if a["id"] < 100]
    folder.content["annotations"] = kept
    for id_, box in enumerate(boxes, start=100):
        folder.annotate(id_, list(box))
    dataset = folder.open()
    report = dataset.report
    skipped = len(report.empty_boxes) + len(report.outside_boxes)
    assert report.boxes + skipped == 3 + len(boxes)
    trained = dataset[0]["instances"].gt_boxes.tensor
    assert len(trained) == 1 + len(boxes) - skipped
    assert (trained[:, 2:] > trained[:, :2]).all()
    assert (trained >= 0).all() and (trained <= torch.tensor([20, 50, 20, 50])).all()
