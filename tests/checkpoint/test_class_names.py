"""Class names that a file carries, through conversions and into models of other data."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dn_detr.checkpoint import (
    CheckpointError,
    Snapshot,
    convert_checkpoint,
    load_model_weights,
    load_tensors,
    read_manifest,
)
from dn_detr.checkpoint.class_rows import choose_rows
from dn_detr.checkpoint.coco_classes import COCO_CATEGORIES, COCO_NAMES
from dn_detr.checkpoint.files import read_file
from tests.checkpoint.layouts import to_layout
from tests.checkpoint.tiny_models import assert_same_state, tiny_model
from tests.checkpoint.writing import save

HEAD = "heads.class_embed.0.weight"
PARTS = tuple(f"part{i}" for i in range(1, 81))
UNKNOWN = (
    "the class names of the file are unknown: its rows are taken in the order of the data's classes"
)


def converted(folder, model, names, to):
    """Save the model as a run of ours and convert it; returns the file."""
    save(folder / "run", Snapshot(1, 1.0, model.state_dict()), class_names=names)
    file = folder / f"{to}.pth"
    num_classes = model.num_classes
    convert_checkpoint(empty(num_classes), folder / "run", file, to=to)
    return file


def empty(num_classes):
    return tiny_model("dn_deformable_detr_r50", num_classes=num_classes, seed=9)


@pytest.mark.parametrize("to", ["official", "detrex"])
@pytest.mark.parametrize(
    ("num_classes", "names"),
    [(80, PARTS), (91, COCO_NAMES), (80, COCO_NAMES[::-1]), (5, ("dog", "cat")), (2, ("a", "b"))],
    ids=["80 others", "COCO in the first rows", "COCO in another order", "unnamed rest", "two"],
)
def test_names_and_weights_survive_the_round_trip(tmp_path, to, num_classes, names):
    source = tiny_model("dn_deformable_detr_r50", num_classes=num_classes)
    file = converted(tmp_path, source, names, to)
    written = torch.load(file, weights_only=True)
    assert written["class_names"] == [*names, *[""] * (num_classes - len(names))]
    assert len(written["model"]["class_embed.0.bias"]) == num_classes
    model = empty(num_classes)
    convert_checkpoint(model, file, tmp_path / "back")
    assert_same_state(model, source)
    assert read_manifest(tmp_path / "back").class_names == list(names)


@pytest.mark.parametrize("to", ["official", "detrex"])
def test_converted_weights_of_other_classes_are_evaluated_and_fine_tuned_by_name(tmp_path, to):
    source = tiny_model("dn_deformable_detr_r50")
    file = converted(tmp_path, source, PARTS, to)
    model = empty(80)
    assert load_model_weights(model, file, class_names=PARTS).notes == ()
    assert_same_state(model, source)
    with pytest.raises(CheckpointError, match="class 0 was 'part1' and now is 'person'"):
        load_model_weights(model, file, class_names=COCO_NAMES)
    report = load_model_weights(model, file, class_names=PARTS[::-1], fine_tune=True)
    assert report.mapped_classes == PARTS[::-1]
    assert torch.equal(model.state_dict()[HEAD], source.state_dict()[HEAD].flip(0))


@pytest.mark.parametrize("names", [(), COCO_NAMES])
def test_names_of_coco_are_not_written(tmp_path, names):
    file = converted(tmp_path, tiny_model("dn_deformable_detr_r50"), names, "official")
    written = torch.load(file, weights_only=True)
    assert set(written) == {"model"} and len(written["model"]["class_embed.0.bias"]) == 91


def test_rows_by_category_id_need_no_names(tmp_path):
    names = [COCO_CATEGORIES.get(row, "N/A") for row in range(91)]
    model = tiny_model("dn_deformable_detr_r50", num_classes=91)
    file = converted(tmp_path, model, names, "official")
    assert set(torch.load(file, weights_only=True)) == {"model"}


@pytest.mark.parametrize(
    ("names", "rows"), [((), 91), (COCO_NAMES, 91), (PARTS, 80), (COCO_NAMES[::-1], 80)]
)
def test_rows_are_spread_over_the_category_ids_of_coco_alone(names, rows):
    state = tiny_model("dn_deformable_detr_r50").state_dict()
    official = to_layout(state, "official", class_names=names)
    assert official["class_embed.0.bias"].shape == (rows,)
    assert len(official["label_enc.weight"]) == rows + 1
    detrex = to_layout(state, "detrex", class_names=names)
    assert detrex["class_embed.0.bias"].shape == (80,)


@pytest.mark.parametrize("suffix", ["pth", "pt"])
def test_names_in_a_file_win_over_those_beside_it(tmp_path, suffix):
    content = {"model": {"class_embed.bias": torch.zeros(2)}, "class_names": ["dog", "cat"]}
    torch.save(content, tmp_path / f"f.{suffix}")
    (tmp_path / "config.json").write_text('{"id2label": {"0": "x", "1": "y"}}')
    assert read_file(tmp_path / f"f.{suffix}").class_names == ("dog", "cat")


@pytest.mark.parametrize("names", [["dog"], ["dog", 3], "ab", {"dog": 1, "cat": 2}, 7])
def test_names_that_do_not_fit_the_rows_are_unused_with_a_note(tmp_path, names):
    content = {"model": {"class_embed.bias": torch.zeros(2)}, "class_names": names}
    torch.save(content, tmp_path / "f.pth")
    read = read_file(tmp_path / "f.pth")
    assert read.class_names == ()
    assert read.notes == ("the class_names of the file are not one string per row: unused",)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_rows_without_names_are_taken_in_order_with_a_note(tmp_path, fine_tune):
    source = tiny_model("dn_deformable_detr_r50", num_classes=2)
    save_file(source.state_dict(), tmp_path / "bare.safetensors")
    model = empty(2)
    file = tmp_path / "bare.safetensors"
    report = load_model_weights(model, file, class_names=["dog", "cat"], fine_tune=fine_tune)
    assert_same_state(model, source)
    assert report.notes == (UNKNOWN,) and report.mapped_classes == ()
    assert load_model_weights(model, file, fine_tune=fine_tune).notes == ()


@pytest.mark.parametrize(
    ("model_classes", "file_classes", "class_names", "words"),
    [
        (5, 91, (), r"has 80 classes in 91 rows \(person, .*the model 5 .*model.num_classes=80"),
        (5, 80, (), r"has 80 classes \(person, .*the model 5 .*model.num_classes=80"),
        (91, 80, (), r"has 80 classes \(person, .*the model 91 .*model.num_classes=80"),
        (2, 91, ("a", "b"), r"class 0 was 'person' and now is 'a'.*model.num_classes=80"),
        (91, 91, COCO_NAMES, r"has 80 classes in 91 rows .*model.num_classes=80"),
        (5, 7, (), r"has 7 classes without names, the model 5 .*model.num_classes=7"),
    ],
)
def test_a_published_file_asks_for_eighty_classes(model_classes, file_classes, class_names, words):
    with pytest.raises(CheckpointError, match=words):
        choose_rows(model_classes, file_classes, class_names=class_names, file_is_coco=True)


@pytest.mark.parametrize(
    ("file_names", "class_names", "both"),
    [
        (("a", "b"), ("c", "d"), "2 classes (a, b), the model 2 classes (c, d)"),
        ((), ("c", "d", "e"), "2 classes without names, the model 3 classes (c, d, e)"),
        (("a", "b"), (), "2 classes (a, b), the model 3 classes without names"),
    ],
)
def test_a_re_initialised_classification_names_both_sides(file_names, class_names, both):
    count = len(class_names) or 3
    rows = choose_rows(count, 2, class_names=class_names, file_names=file_names, fine_tune=True)
    assert rows.note == f"the file has {both}: the classification head is re-initialised"


def test_classes_without_a_name_are_counted():
    rows = choose_rows(80, 91, class_names=["dog"], file_is_coco=True, fine_tune=True)
    assert rows.note.startswith("1 of 80 classes take their rows by name (dog); the others are re-")
    assert rows.note.endswith("(no name) and 69 more)")


def test_the_note_reaches_the_report():
    state = to_layout(tiny_model("dn_deformable_detr_r50").state_dict(), "official")
    report = load_tensors(empty(3), state, class_names=PARTS[:3], fine_tune=True)
    assert report.notes == (
        "the file has 80 classes in 91 rows (person, bicycle, car and 77 more), the model 3 "
        "classes (part1, part2, part3): the classification head is re-initialised",
    )
