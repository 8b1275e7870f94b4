from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from dn_detr.checkpoint import Snapshot
from dn_detr.config import LazyConfig, get_config, instantiate
from dn_detr.structures import Boxes, Instances
from tests.checkpoint.writing import save
from tools import make_digits, make_pictures
from tools.make_pictures import match_predictions, mosaic, plot_curves, read_metrics

SIZE = (32, 32)
LEFT, RIGHT = [2.0, 2, 12, 12], [18.0, 18, 30, 30]


def objects(*boxes_and_classes: tuple[list[float], int]) -> Instances:
    boxes, classes = zip(*boxes_and_classes, strict=True) if boxes_and_classes else ([], [])
    return Instances(SIZE, gt_boxes=Boxes(list(boxes)), gt_classes=torch.tensor(classes).long())


def detections(*found: tuple[list[float], int, float]) -> Instances:
    boxes, classes, scores = zip(*found, strict=True) if found else ([], [], [])
    return Instances(
        SIZE,
        pred_boxes=Boxes(list(boxes)),
        pred_classes=torch.tensor(classes).long(),
        scores=torch.tensor(scores, dtype=torch.float32),
    )


def colours_of(picture: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(map(int, pixel)) for pixel in np.asarray(picture).reshape(-1, 3)}


def draw(predictions: Instances, truth: Instances, **options: Any) -> set[tuple[int, ...]]:
    image = Image.new("RGB", SIZE, (10, 20, 30))
    return colours_of(mosaic([image], [predictions], [truth], ["cat", "dog"], **options))


def test_match_needs_class_and_overlap() -> None:
    truth = objects((LEFT, 0), (RIGHT, 1))
    predictions = detections((LEFT, 0, 0.9), (LEFT, 1, 0.8), ([20.0, 2, 30, 12], 1, 0.7))
    correct, found = match_predictions(predictions, truth)
    assert correct.tolist() == [True, False, False]
    assert found.tolist() == [True, False]


def test_an_object_is_claimed_once_by_the_best_score() -> None:
    predictions = detections((LEFT, 0, 0.5), (LEFT, 0, 0.9))
    correct, _ = match_predictions(predictions, objects((LEFT, 0)))
    assert correct.tolist() == [False, True]


def test_a_claimed_object_leaves_the_next_best_to_others() -> None:
    near = [2.0, 2, 12, 13]
    truth = objects((LEFT, 0), (near, 0))
    correct, found = match_predictions(detections((LEFT, 0, 0.9), (LEFT, 0, 0.8)), truth)
    assert correct.tolist() == [True, True]
    assert found.tolist() == [True, True]


@pytest.mark.parametrize("truth", [objects(), objects((LEFT, 0))])
@pytest.mark.parametrize("predictions", [detections(), detections((RIGHT, 1, 0.9))])
def test_nothing_matches_nothing(predictions: Instances, truth: Instances) -> None:
    correct, found = match_predictions(predictions, truth)
    assert not correct.any()
    assert not found.any()
    assert (len(correct), len(found)) == (len(predictions), len(truth))


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        (detections((LEFT, 0, 0.9)), {make_pictures.CORRECT, make_pictures.FOUND}),
        (detections((LEFT, 1, 0.9)), {make_pictures.WRONG, make_pictures.MISSED}),
        (detections(), {make_pictures.MISSED}),
    ],
)
def test_colours_tell_right_from_wrong(predictions: Instances, expected: set[str]) -> None:
    marks = {make_pictures.CORRECT, make_pictures.WRONG, make_pictures.MISSED}
    colours = draw(predictions, objects((LEFT, 0)))
    for mark in marks:
        assert (ImageColor.getrgb(mark) in colours) == (mark in expected)


def test_the_best_of_two_equal_boxes_is_drawn_on_top() -> None:
    duplicates = detections((LEFT, 0, 0.9), (LEFT, 0, 0.5))
    seen = draw(duplicates, objects((LEFT, 0)))
    assert ImageColor.getrgb(make_pictures.CORRECT) in seen
    assert ImageColor.getrgb(make_pictures.WRONG) not in seen


def test_predictions_below_the_threshold_are_not_drawn() -> None:
    green = ImageColor.getrgb(make_pictures.CORRECT)
    predictions, truth = detections((LEFT, 0, 0.3)), objects((LEFT, 0))
    assert green in draw(predictions, truth, score_threshold=0.3)
    assert green not in draw(predictions, truth, score_threshold=0.31)


@pytest.mark.parametrize(
    ("predictions", "truth", "colour", "panel"),
    [
        (detections((LEFT, 0, 0.9)), objects(), make_pictures.WRONG, 1),
        (detections(), objects((LEFT, 0)), make_pictures.MISSED, 0),
    ],
)
def test_boxes_are_scaled_with_the_enlarged_image(
    predictions: Instances, truth: Instances, colour: str, panel: int
) -> None:
    image = Image.new("RGB", SIZE)
    picture = mosaic([image], [predictions], [truth], ["cat"], panel_size=320)
    pixels = np.asarray(picture)[make_pictures.HEADER_HEIGHT :]
    marked = (pixels == ImageColor.getrgb(colour)).all(axis=2)
    columns = np.flatnonzero(marked.any(axis=0)) - panel * (320 + make_pictures.GAP)
    rows = np.flatnonzero(marked.any(axis=1))
    assert (columns[0], columns[-1], rows[-1]) == (20, 120, 120)


def test_images_of_different_shapes_share_a_mosaic() -> None:
    images = [Image.new("RGB", size, "blue") for size in ((40, 20), (20, 40), (7, 7), (30, 1))]
    picture = mosaic(
        images, [detections()] * 4, [objects()] * 4, ["cat"], columns=2, panel_size=100
    )
    blue = (np.asarray(picture) == (0, 0, 255)).all(axis=2).sum()
    assert blue == 2 * (100 * 50 + 50 * 100 + 100 * 100 + 100 * 3)


def test_classes_that_the_data_does_not_name_are_drawn_too() -> None:
    assert ImageColor.getrgb(make_pictures.WRONG) in draw(detections((LEFT, 7, 0.9)), objects())


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="1 images, 0 predictions"):
        mosaic([Image.new("RGB", SIZE)], [], [objects()], ["cat"])


def write_records(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


TRAINING_RECORDS: list[dict[str, Any]] = [
    {"iteration": 20, "loss": 9.0, "loss/loss_ce": 5.0, "loss/loss_ce_dn": 3.0,
     "loss/loss_ce_dn_0": 1.0, "lr": 1e-4},
    {"iteration": 40, "loss": 7.0, "loss/loss_ce": 4.0, "loss/loss_ce_dn": 2.0,
     "loss/loss_ce_dn_0": 1.0, "lr": 1e-4},
]  # fmt: skip


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[float]]]:
    """What is plotted: label -> [x, y]."""
    drawn: dict[str, list[list[float]]] = {}
    save = Figure.savefig

    def record(figure: Figure, *args: Any, **options: Any) -> None:
        for axes in figure.axes:
            for line in axes.get_lines():
                drawn[str(line.get_label()).split(" ")[0]] = [
                    list(map(float, line.get_xdata())),
                    list(map(float, line.get_ydata())),
                ]
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return drawn


def test_curves_split_the_loss(tmp_path: Path, lines: dict[str, list[list[float]]]) -> None:
    written = plot_curves(write_records(tmp_path, TRAINING_RECORDS), tmp_path / "curves.png")
    assert lines["total"] == [[20, 40], [9, 7]]
    assert lines["matching"] == [[20, 40], [5, 4]]
    assert lines["denoising"] == [[20, 40], [4, 3]]
    with Image.open(written) as picture:
        assert picture.format == "PNG"


def test_curves_without_denoising_show_the_total_only(
    tmp_path: Path, lines: dict[str, list[list[float]]]
) -> None:
    records = [{"iteration": 1, "loss": 2.0, "loss/loss_ce": 2.0}]
    plot_curves(write_records(tmp_path, records), tmp_path / "curves.png")
    assert lines["total"] == [[1], [2]]
    assert not {"matching", "denoising"} & set(lines)


def test_curves_show_ap_and_leave_out_undefined(
    tmp_path: Path, lines: dict[str, list[list[float]]]
) -> None:
    records = [
        {"iteration": 10, "eval/AP": 0.2, "eval/AP50": 0.5},
        {"iteration": 20, "eval/AP": -1.0, "eval/AP50": None},
    ]
    plot_curves(write_records(tmp_path, records), tmp_path / "curves.png")
    assert lines["AP"][1][0] == 0.2
    assert lines["AP50"][1][0] == 0.5
    assert math.isnan(lines["AP"][1][1])
    assert math.isnan(lines["AP50"][1][1])


def test_unfinished_last_line_is_not_read(tmp_path: Path) -> None:
    path = write_records(tmp_path, TRAINING_RECORDS, tail='{"iteration": 60, "lo')
    assert read_metrics(path) == TRAINING_RECORDS


@pytest.mark.parametrize("content", ["", '{"iteration": 1', "no json\n"])
def test_unusable_metrics_name_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_metrics(path)


def test_missing_metrics_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.fixture(scope="module")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="needs the extra `demo`")
    root = tmp_path_factory.mktemp("data") / "digits"
    return make_digits.write_digits_dataset(root, num_train=1, num_val=2)


@pytest.fixture(scope="module")
def run_folder(digits_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training would leave, with untrained weights."""
    folder = tmp_path_factory.mktemp("run")
    cfg = get_config("digits_dn_deformable_detr.py")
    cfg = LazyConfig.apply_overrides(cfg, [f"dataloader.root={digits_root}"])
    LazyConfig.save(cfg, folder / "config.yaml")
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    config = LazyConfig.to_yaml(cfg)
    save(folder, Snapshot(10, 1.0, model.state_dict()), config=config)
    records = [
        {"iteration": 10, "loss": 3.0, "loss/loss_ce": 2.0, "loss/loss_ce_dn": 1.0},
        {"iteration": 10, "eval/AP": 0.25, "eval/AP50": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_command_draws_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(run_folder), "--images", "2", "--score-threshold", "0"]
    assert make_pictures.main(arguments) == 0
    for name in ("predictions.png", "curves.png"):
        with Image.open(run_folder / name) as picture:
            assert picture.format == "PNG"
    assert "AP50 0.500, AP 0.250" in capsys.readouterr().out


def test_the_command_names_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_pictures.main(["--run", str(tmp_path)]) == 1
    assert str(tmp_path / "metrics.jsonl") in capsys.readouterr().err
