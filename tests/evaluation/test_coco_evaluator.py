from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dn_detr.data import CocoDetection
from dn_detr.evaluation import CocoEvaluator, format_results
from dn_detr.structures import Boxes, Instances

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
CATEGORY_IDS = [2, 5, 90]  # with holes; classes 0, 1, 2
IMAGE_IDS = [3, 7, 12, 40]
NEARLY_ONE = pytest.approx(1)  # pycocotools divides by a sum plus the smallest float


def write_data(
    root: Path,
    annotations: list[dict[str, Any]],
    image_ids: Sequence[int] = IMAGE_IDS,
    category_ids: Sequence[int] = CATEGORY_IDS,
) -> Path:
    """A data set of 400x400 images whose files are never opened; ids are out of order."""
    for id_ in image_ids:
        (root / f"{id_}.jpg").touch()
    content = {
        "images": [
            {"id": id_, "file_name": f"{id_}.jpg", "width": 400, "height": 400}
            for id_ in reversed(image_ids)
        ],
        "annotations": annotations,
        "categories": [{"id": id_, "name": f"class {id_}"} for id_ in reversed(category_ids)],
    }
    file = root / "instances.json"
    file.write_text(json.dumps(content))
    return file


def open_data(root: Path, annotations: list[dict[str, Any]], **more: Any) -> CocoDetection:
    return CocoDetection(root, write_data(root, annotations, **more), train=False)


def box_annotation(
    id_: int, bbox: list[float], image_id: int = 3, category_id: int = 2, iscrowd: int = 0
) -> dict[str, Any]:
    return {
        "id": id_, "image_id": image_id, "category_id": category_id, "bbox": bbox,
        "iscrowd": iscrowd, "area": bbox[2] * bbox[3],
    }  # fmt: skip


def result(
    bbox: list[float], score: float = 0.5, image_id: int = 3, category_id: int = 2
) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def feed(
    evaluator: CocoEvaluator, image_id: int, results: Sequence[dict[str, Any]], **fields: Any
) -> None:
    """Hand the results of one image to the evaluator, as a model would give them."""
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    output = {
        "pred_boxes": Boxes(boxes),
        "scores": torch.tensor([r["score"] for r in results]),
        "pred_classes": torch.tensor(
            [CATEGORY_IDS.index(r["category_id"]) for r in results], dtype=torch.int64
        ),
    } | fields
    instances = Instances((400, 400), **output)
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])


def evaluate(dataset: CocoDetection, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    evaluator = CocoEvaluator()
    evaluator.reset(dataset)
    for image_id in dataset.image_ids:
        feed(evaluator, image_id, [r for r in results if r["image_id"] == image_id])
    metrics = evaluator.evaluate()
    assert metrics is not None
    return metrics


def reference(
    file: Path,
    results: list[dict[str, Any]],
    image_ids: Sequence[int] | None = None,
    category_id: int | None = None,
) -> list[float]:
    """The 12 numbers of plain pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        if category_id is not None:
            evaluation.params.catIds = [category_id]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


# Quarters of pixels and 64ths of scores are exact in float32, so that both sides see one number.
def quarters(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(4 * low, 4 * high).map(lambda n: n / 4)


boxes = st.tuples(quarters(0, 300), quarters(0, 300), quarters(1, 120), quarters(1, 120)).map(list)
scores = st.integers(0, 64).map(lambda n: n / 64)
image_ids = st.sampled_from(IMAGE_IDS[:-1])  # the last image never has ground truth
category_ids = st.sampled_from(CATEGORY_IDS[:-1])  # nor the last category


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ground truth and results, some of them near a ground-truth box."""
    kinds = draw(
        st.lists(st.tuples(boxes, image_ids, category_ids, st.booleans()), min_size=1, max_size=8)
    )
    ids = draw(st.permutations(range(1, len(kinds) + 1)))
    truth = [
        box_annotation(id_, box, image_id, category_id, int(crowd))
        for id_, (box, image_id, category_id, crowd) in zip(ids, kinds, strict=True)
    ]
    shifts = st.tuples(*[quarters(-6, 6)] * 2)
    near = draw(st.lists(st.tuples(st.sampled_from(truth), shifts, scores), max_size=10))
    far = draw(
        st.lists(
            st.tuples(boxes, scores, st.sampled_from(IMAGE_IDS), st.sampled_from(CATEGORY_IDS)),
            min_size=1,
            max_size=6,
        )
    )
    hits = [
        result(
            [t["bbox"][0] + dx, t["bbox"][1] + dy, *t["bbox"][2:]],
            score,
            t["image_id"],
            t["category_id"],
        )
        for t, (dx, dy), score in near
    ]
    return truth, sorted((*hits, *(result(*parts) for parts in far)), key=lambda r: r["image_id"])


on_generated_data = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@on_generated_data
@given(scene=scenes())
def test_the_twelve_numbers_are_those_of_pycocotools(tmp_path: Path, scene: Any) -> None:
    truth, results = scene
    dataset = open_data(tmp_path, truth)
    metrics = evaluate(dataset, results)
    assert [metrics[name] for name in NAMES] == reference(dataset.annotation_file, results)


@on_generated_data
@given(scene=scenes())
def test_ap_of_a_class_is_that_of_pycocotools_on_its_category(tmp_path: Path, scene: Any) -> None:
    truth, results = scene
    dataset = open_data(tmp_path, truth)
    per_class = evaluate(dataset, results)["per_class"]
    for category_id in CATEGORY_IDS:
        alone = reference(dataset.annotation_file, results, category_id=category_id)[0]
        assert per_class[f"class {category_id}"] == alone


@on_generated_data
@given(scene=scenes())
def test_annotation_id_zero_changes_nothing(tmp_path: Path, scene: Any) -> None:
    truth, results = scene
    clean = evaluate(open_data(tmp_path, truth), results)
    from_zero = [{**annotation, "id": annotation["id"] - 1} for annotation in truth]
    assert evaluate(open_data(tmp_path, from_zero), results) == clean


@on_generated_data
@given(scene=scenes(), count=st.integers(1, 3))
def test_a_subset_is_evaluated_on_its_images_only(tmp_path: Path, scene: Any, count: int) -> None:
    truth, results = scene
    dataset = open_data(tmp_path, truth)
    metrics = evaluate(dataset.subset(count), results)
    expected = reference(dataset.annotation_file, results, image_ids=IMAGE_IDS[:count])
    assert [metrics[name] for name in NAMES] == expected


def test_annotation_id_zero_really_misleads_plain_pycocotools(tmp_path: Path) -> None:
    """If this fails, renumbering has become unnecessary."""
    file = write_data(tmp_path, [box_annotation(0, [10, 10, 50, 50])])
    assert reference(file, [result([10, 10, 50, 50])])[0] == 0


def test_perfect_detections_score_one(tmp_path: Path) -> None:
    dataset = open_data(tmp_path, [box_annotation(0, [10, 10, 50, 50])])
    metrics = evaluate(dataset, [result([10, 10, 50, 50])])
    assert metrics["AP"] == metrics["APm"] == NEARLY_ONE
    assert metrics["APs"] == -1
    assert metrics["per_class"] == {"class 2": NEARLY_ONE, "class 5": -1, "class 90": -1}


def test_no_detections_give_zero_where_there_is_ground_truth(tmp_path: Path) -> None:
    metrics = evaluate(open_data(tmp_path, [box_annotation(1, [10, 10, 50, 50])]), [])
    assert [metrics[name] for name in NAMES] == [0, 0, 0, -1, 0, -1, 0, 0, 0, -1, 0, -1]
    assert metrics["per_class"] == {"class 2": 0, "class 5": -1, "class 90": -1}


@pytest.mark.parametrize("results", [[], [result([1, 1, 5, 5])]])
def test_without_ground_truth_everything_is_undefined(
    tmp_path: Path, results: list[dict[str, Any]]
) -> None:
    metrics = evaluate(open_data(tmp_path, []), results)
    assert [metrics[name] for name in NAMES] == [-1] * 12


@pytest.fixture
def evaluator(tmp_path: Path) -> CocoEvaluator:
    evaluator = CocoEvaluator(tmp_path / "eval")
    evaluator.reset(open_data(tmp_path, [box_annotation(1, [10, 10, 50, 50])]))
    return evaluator


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_box_or_score_that_is_not_finite_is_refused(evaluator: CocoEvaluator, bad: float) -> None:
    with pytest.raises(ValueError, match=r"image id 7: .*not finite"):
        feed(evaluator, 7, [result([1, 2, bad, 4])])
    with pytest.raises(ValueError, match=r"image id 7: .*not finite"):
        feed(evaluator, 7, [result([1, 2, 3, 4], score=bad)])


def test_unknown_image_is_refused(evaluator: CocoEvaluator) -> None:
    with pytest.raises(ValueError, match=r"image id 99 is not in .*instances\.json"):
        feed(evaluator, 99, [result([1, 2, 3, 4])])


def test_negative_class_is_refused(evaluator: CocoEvaluator) -> None:
    with pytest.raises(ValueError, match="image id 3: negative class index -1"):
        feed(evaluator, 3, [result([1, 2, 3, 4])], pred_classes=torch.tensor([-1]))


def test_one_output_per_image_is_required(evaluator: CocoEvaluator) -> None:
    with pytest.raises(ValueError, match="1 images but 0 outputs"):
        evaluator.process([{"image_id": 3}], [])


def test_use_before_reset_is_refused() -> None:
    with pytest.raises(ValueError, match="reset"):
        CocoEvaluator().evaluate()


def test_class_beyond_the_data_is_dropped_and_counted(
    evaluator: CocoEvaluator, caplog: pytest.LogCaptureFixture
) -> None:
    truth = result([10, 10, 50, 50])
    feed(evaluator, 3, [truth, truth], pred_classes=torch.tensor([0, 3]))
    metrics = evaluator.evaluate()
    assert metrics is not None and metrics["AP"] == NEARLY_ONE
    assert "1 detections were dropped" in caplog.text


def test_repeated_image_counts_once(
    evaluator: CocoEvaluator, caplog: pytest.LogCaptureFixture
) -> None:
    feed(evaluator, 3, [result([10, 10, 50, 50])])
    feed(evaluator, 3, [result([200, 10, 50, 50], score=0.9)])
    metrics = evaluator.evaluate()
    assert metrics is not None and metrics["AP"] == NEARLY_ONE
    assert "1 images were evaluated more than once" in caplog.text


def test_images_that_never_came_are_reported(
    evaluator: CocoEvaluator, caplog: pytest.LogCaptureFixture
) -> None:
    feed(evaluator, 7, [])
    metrics = evaluator.evaluate()
    assert metrics is not None and metrics["AP"] == 0
    assert "3 of 4 images" in caplog.text and "image ids 3, 12, 40" in caplog.text


def test_reset_forgets(evaluator: CocoEvaluator, tmp_path: Path) -> None:
    feed(evaluator, 3, [result([10, 10, 50, 50])])
    evaluator.reset(open_data(tmp_path, [box_annotation(1, [10, 10, 50, 50])]))
    metrics = evaluator.evaluate()
    assert metrics is not None and metrics["AP"] == 0


def test_written_predictions_are_coco_results(evaluator: CocoEvaluator, tmp_path: Path) -> None:
    results = [result([10, 10, 50, 52]), result([30, 40, 20, 20], 0.25, 7, 90)]
    for image_id in IMAGE_IDS:
        feed(evaluator, image_id, [r for r in results if r["image_id"] == image_id])
    metrics = evaluator.evaluate()
    assert json.loads((tmp_path / "eval/predictions.json").read_text()) == results
    assert json.loads((tmp_path / "eval/metrics.json").read_text()) == metrics
    assert metrics is not None
    assert [metrics[name] for name in NAMES] == reference(tmp_path / "instances.json", results)


def test_nothing_is_printed_but_a_table_is_logged(
    evaluator: CocoEvaluator,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    feed(evaluator, 3, [result([10, 10, 50, 50])])
    metrics = evaluator.evaluate()
    assert metrics is not None
    assert capsys.readouterr().out == ""
    assert format_results(metrics) in caplog.text


def test_table_shows_percent_and_marks_undefined_values() -> None:
    metrics = dict.fromkeys(NAMES, 0.4567) | {"APs": -1.0, "per_class": {"cat": 0.5, "dog": -1.0}}
    table = format_results(metrics)
    numbers, per_class = (part.split() for part in table.split("AP per class"))
    shown = dict(zip(numbers[::2], numbers[1::2], strict=True))
    assert shown == dict.fromkeys(NAMES, "45.67") | {"APs": "-"}
    assert per_class == ["cat", "50.00", "dog", "-"]


@pytest.mark.parametrize("is_full", [True, False])
def test_results_that_cannot_be_written_are_an_error_in_the_log_and_no_exception(
    evaluator: CocoEvaluator,
    tmp_path: Path,
    is_full: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("dn_detr"), "propagate", True)
    folder, names = tmp_path / "eval", ("predictions.json", "metrics.json")
    if is_full:
        folder.mkdir()
        for name in names:
            (folder / name).symlink_to("/dev/full")
    else:
        folder.touch()  # a file of that name
    feed(evaluator, 3, [result([0, 0, 100, 100], 0.5)])
    assert evaluator.evaluate() is not None
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    reason = "No space left on device" if is_full else "File exists"
    assert errors == [
        f"{folder / name} is not written: {reason}; the results are in the log" for name in names
    ]
    assert evaluator.unwritten == [folder / name for name in names]
