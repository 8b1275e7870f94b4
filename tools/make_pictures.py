"""Draw what a trained model finds beside the ground truth, and the curves of its training.

    python tools/make_pictures.py --run output/demo
    python tools/make_pictures.py --run output/demo --images 4 --score-threshold 0.2

Reads `config.yaml`, the best checkpoint (the last, where none is best) and `metrics.jsonl` of the
run; writes `predictions.png` and `curves.png` beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import to_pil_image

from dn_detr.config import LazyConfig, instantiate
from dn_detr.config.command_line import add_trust_argument
from dn_detr.predictor import load
from dn_detr.structures import Instances

CORRECT, WRONG, MISSED, FOUND = "#2fd35d", "#ff3b30", "#ff9f0a", "#ffffff"
MATCH_IOU = 0.5
GAP = 4  # pixels between the pictures of a mosaic
HEADER_HEIGHT = 20


def mosaic(
    images: Sequence[Image.Image],
    predictions: Sequence[Instances],
    truths: Sequence[Instances],
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.4,
    columns: int = 3,
    panel_size: int = 256,
) -> Image.Image:
    """Draw every image twice, side by side: its ground truth, and what the detector found.

    On the right a prediction is green if it is correct (an object of its class, not yet claimed
    by a better prediction, with IoU >= 0.5), else red. On the left an object is white if a
    prediction claims it, else orange.

    Args:
        images: RGB, of any sizes.
        predictions: per image `pred_boxes`, `scores` in [0, 1] and `pred_classes`, in pixels of
            the image.
        truths: per image `gt_boxes` and `gt_classes`, in pixels of the image.
        class_names: name of each class; where the model has more, they are called "class 10".
        score_threshold: predictions below it are not drawn and claim nothing.
        columns: pairs in a row, at most.
        panel_size: longest side of one picture in pixels; small images are enlarged.

    Returns:
        One RGB image.

    Raises:
        ValueError: the lists are empty or of different length.
    """
    if not images or not len(images) == len(predictions) == len(truths):
        raise ValueError(
            f"{len(images)} images, {len(predictions)} predictions, {len(truths)} ground truths: "
            "give as many of each, at least one"
        )
    pairs = [
        _draw_pair(image, found[found.scores >= score_threshold], truth, class_names, panel_size)
        for image, found, truth in zip(images, predictions, truths, strict=True)
    ]
    columns = min(columns, len(pairs))
    width = max(pair.width for pair in pairs) + 2 * GAP
    height = max(pair.height for pair in pairs) + GAP
    rows = math.ceil(len(pairs) / columns)
    canvas = Image.new("RGB", (columns * width, HEADER_HEIGHT + rows * height), "black")
    for column in range(columns):
        text = "ground truth (orange: missed)  |  predictions (red: wrong)"
        ImageDraw.Draw(canvas).text((column * width + GAP, 3), text, "white", _font(12))
    for i, pair in enumerate(pairs):
        x, y = i % columns * width, HEADER_HEIGHT + i // columns * height
        canvas.paste(pair, (x, y))
    return canvas


def match_predictions(predictions: Instances, truth: Instances) -> tuple[Tensor, Tensor]:
    """Decide which predictions are correct and which objects are found, at IoU >= 0.5.

    Predictions choose in order of their score; each takes the object of its class with the
    largest IoU that no better prediction has taken.

    Args:
        predictions: N of them, with `pred_boxes`, `scores` and `pred_classes`.
        truth: M objects with `gt_boxes` and `gt_classes`.

    Returns:
        `correct` (N,) bool and `found` (M,) bool.
    """
    correct = torch.zeros(len(predictions), dtype=torch.bool)
    found = torch.zeros(len(truth), dtype=torch.bool)
    iou = box_iou(predictions.pred_boxes.tensor, truth.gt_boxes.tensor)
    iou[predictions.pred_classes[:, None] != truth.gt_classes] = 0
    for i in predictions.scores.argsort(descending=True).tolist():
        available = iou[i] * ~found
        if len(truth) and available.max() >= MATCH_IOU:
            correct[i] = True
            found[available.argmax()] = True
    return correct, found


def plot_curves(metrics_file: str | Path, output_file: str | Path) -> Path:
    """Plot losses and AP over the iterations of a run.

    Args:
        metrics_file: `metrics.jsonl` of the run. A last line without its end, as a running or
            killed process leaves it, is not read.
        output_file: picture to write; the suffix says in which format.

    Returns:
        `output_file` as a path.

    Raises:
        ValueError: the file is missing, damaged, or has no record yet.
    """
    records = read_metrics(metrics_file)
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, ap_axes = figure.subplots(1, 2)
    _plot_losses(loss_axes, [record for record in records if "loss" in record])
    _plot_ap(ap_axes, [record for record in records if "eval/AP" in record])
    figure.savefig(output_file, dpi=120)
    return Path(output_file)


def read_metrics(metrics_file: str | Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl`; see `plot_curves`."""
    path = Path(metrics_file)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the output folder of a training run")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove it") from error
    if not records:
        raise ValueError(
            f"{path} has no record yet: wait for the first train.log_period iterations"
        )
    return records


def _draw_pair(
    image: Image.Image,
    predictions: Instances,
    truth: Instances,
    class_names: Sequence[str],
    panel_size: int,
) -> Image.Image:
    """Ground truth on the left, predictions on the right."""
    predictions = predictions[predictions.scores.argsort()]  # the best are drawn last, on top
    correct, found = match_predictions(predictions, truth)
    scale = panel_size / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    left = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    right = left.copy()
    truth_names = [class_names[label] for label in truth.gt_classes.tolist()]
    _draw_boxes(
        left,
        truth.gt_boxes.tensor * scale,
        truth_names,
        [FOUND if is_found else MISSED for is_found in found.tolist()],
    )
    captions = [
        f"{_name_of(label, class_names)} {score:.2f}"
        for label, score in zip(
            predictions.pred_classes.tolist(), predictions.scores.tolist(), strict=True
        )
    ]
    _draw_boxes(
        right,
        predictions.pred_boxes.tensor * scale,
        captions,
        [CORRECT if is_correct else WRONG for is_correct in correct.tolist()],
    )
    pair = Image.new("RGB", (2 * size[0] + GAP, size[1]), "black")
    pair.paste(left, (0, 0))
    pair.paste(right, (size[0] + GAP, 0))
    return pair


def _name_of(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if label < len(class_names) else f"class {label}"


def _draw_boxes(
    image: Image.Image, boxes_xyxy: Tensor, captions: Sequence[str], colours: Sequence[str]
) -> None:
    """Outline boxes (N, 4), in pixels of `image`, with a caption above or at the upper edge."""
    draw = ImageDraw.Draw(image)
    font = _font(12)
    for box, caption, colour in zip(boxes_xyxy.tolist(), captions, colours, strict=True):
        draw.rectangle(box, outline=colour, width=2)
        left, _, right, bottom = draw.textbbox((0, 0), caption, font)
        x = min(max(box[0], 0), image.width - (right - left) - 4)
        y = max(box[1] - bottom - 3, 0)
        draw.rectangle((x, y, x + right - left + 3, y + bottom + 2), fill=colour)
        draw.text((x + 2, y), caption, "black", font)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _plot_losses(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    """The total, and its parts from matching and from denoising if there is denoising."""
    iterations = [record["iteration"] for record in records]
    axes.plot(iterations, _column(records, "loss"), label="total", color="black", linewidth=1)
    denoising = [[name for name in record if _is_denoising(name)] for record in records]
    if any(denoising):
        parts = [
            math.fsum(_number(record[name]) for name in names)
            for record, names in zip(records, denoising, strict=True)
        ]
        totals = _column(records, "loss")
        matching = [total - part for total, part in zip(totals, parts, strict=True)]
        axes.plot(iterations, matching, label="matching", linewidth=1)
        axes.plot(iterations, parts, label="denoising", linewidth=1)
    axes.set(title="Training loss, all decoder layers", xlabel="iteration", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_ap(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    iterations = [record["iteration"] for record in records]
    for name in ("AP50", "AP"):
        # -1 is COCO's mark for "no ground truth": nothing to draw.
        values = [v if v >= 0 else math.nan for v in _column(records, f"eval/{name}")]
        last = f" ({values[-1]:.3f} at the end)" if values else ""
        axes.plot(iterations, values, marker="o", markersize=3, label=name + last)
    axes.set(title="COCO metrics on the test set", xlabel="iteration", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _is_denoising(name: str) -> bool:
    """Whether a column is a loss of denoising queries, like `loss/loss_ce_dn_0`."""
    return name.startswith("loss/") and "dn" in name.split("_")


def _column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [_number(record[name]) for record in records]


def _number(value: float | None) -> float:
    """Values that were not finite are null in the file."""
    return math.nan if value is None else float(value)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of a training run")
    parser.add_argument("--images", type=int, default=12, help="how many test images to draw (12)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.4, help="lowest score to draw (0.4)"
    )
    add_trust_argument(parser)
    return parser.parse_args(argv)


def draw_predictions(
    run: Path, count: int, score_threshold: float, trust: Sequence[str] = ()
) -> Image.Image:
    """Draw the first `count` test images with the best weights of a run, on the CPU."""
    predictor = load(run, trust=trust)
    cfg = LazyConfig.load(run / "config.yaml", allow=tuple(trust))
    # The test images as they are in the file, with their objects.
    truth = instantiate(cfg.dataloader.test.dataset, train=True, transforms=None)
    samples = [truth[i] for i in range(min(count, len(truth)))]
    images = [sample["image"] for sample in samples]
    return mosaic(
        [to_pil_image(image) for image in images],
        predictor.predict(images, score_threshold),
        [sample["instances"] for sample in samples],
        truth.class_names,
        score_threshold=score_threshold,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write both pictures and say where they are; returns the exit code."""
    arguments = parse_arguments(argv)
    run: Path = arguments.run
    try:
        evaluations = [r for r in read_metrics(run / "metrics.jsonl") if "eval/AP50" in r]
        curves = plot_curves(run / "metrics.jsonl", run / "curves.png")
        picture = draw_predictions(
            run, arguments.images, arguments.score_threshold, arguments.trust
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    picture.save(run / "predictions.png")
    print(f"Pictures: {run / 'predictions.png'} and {curves}")
    if evaluations:
        last = evaluations[-1]
        print(f"AP50 {last['eval/AP50']:.3f}, AP {last['eval/AP']:.3f} (COCO, test set)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
