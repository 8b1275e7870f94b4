"""Draw the pictures of docs/denoising.md: noised boxes, the attention mask, AP over the epochs.

    python tools/make_denoising_pictures.py

The noise and the mask are those that training computes. The curves are drawn of a study that
`benchmarks/convergence.py --json FILE` has written, where there is one. Needs scikit-learn for the
digits (`pip install 'dn_detr[demo]'`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from dn_detr.modeling import BoxQueryEmbedding, QueryDenoising, Targets
from dn_detr.projects.dino.modeling import ContrastiveDenoising
from dn_detr.structures import box_cxcywh_to_xyxy
from tools.make_digits import write_digits_dataset

_ROOT = Path(__file__).resolve().parents[1]
FOLDER = _ROOT / "docs" / "denoising"
STUDY = _ROOT / "benchmarks" / "results" / "denoising_digits.json"
NUM_CLASSES, NUM_QUERIES = 10, 4
OBJECT, NEAR, FAR = "white", "#2fd35d", "#ff3b30"


def draw_noise(path: Path, *, groups: int = 3) -> None:
    """Boxes of an image as denoising and contrastive denoising noise them."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_digits_dataset(
            Path(folder) / "data", num_train=1, num_val=1, digits_per_image=(3, 3), seed=5
        )
        (file,) = (root / "train2017").iterdir()
        image = Image.open(file).convert("RGB")
        content = json.loads((root / "annotations/instances_train2017.json").read_text())
    boxes_xywh = torch.tensor([each["bbox"] for each in content["annotations"]]) / image.width
    centres = boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2
    labels = torch.tensor([each["category_id"] - 1 for each in content["annotations"]])
    targets = [{"labels": labels, "boxes": torch.cat([centres, boxes_xywh[:, 2:]], dim=1)}]
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    noises = {
        "denoising, box noise 0.4": QueryDenoising(NUM_CLASSES, num_groups=groups),
        "contrastive denoising, box noise 1": ContrastiveDenoising(NUM_CLASSES, num_groups=groups),
    }
    for axes, (title, noise) in zip(figure.subplots(1, 2), noises.items(), strict=True):
        noised = noise.noise(targets, seeds=[0])
        positive = set(noised.pairs.query[0].tolist())
        axes.imshow(image, interpolation="nearest", alpha=0.7)
        for slot, box in zip(noised.slot.tolist(), noised.boxes, strict=True):
            _draw_box(axes, box * image.width, NEAR if slot in positive else FAR, 1.0)
        for box in targets[0]["boxes"]:
            _draw_box(axes, box * image.width, OBJECT, 2.5)
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def draw_mask(path: Path) -> None:
    """Who sees whom in a batch of an image with three objects and one with two, two groups."""
    targets: Targets = [
        {"labels": torch.arange(count), "boxes": torch.full((count, 4), 0.5)} for count in (3, 2)
    ]
    denoising = QueryDenoising(NUM_CLASSES, BoxQueryEmbedding(NUM_CLASSES, 8), num_groups=2)
    noised = denoising(targets, torch.zeros(2, NUM_QUERIES, 8), torch.zeros(2, NUM_QUERIES, 4))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axes, blocked, count in zip(
        figure.subplots(1, 2), noised.attention_mask, (3, 2), strict=True
    ):
        empty = {"empty": noised.num_slots - 2 * count} if count < 3 else {}
        parts = {"group 1": count, "group 2": count} | empty | {"matching": NUM_QUERIES}
        ends = torch.tensor(list(parts.values())).cumsum(0).tolist()
        axes.imshow(blocked.numpy(), cmap="Greys", vmin=-0.2, vmax=1.6)
        ticks = [end - (length + 1) / 2 for end, length in zip(ends, parts.values(), strict=True)]
        axes.set_xticks(ticks, list(parts), rotation=30)
        axes.set_yticks(ticks, list(parts))
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="black", linewidth=0.8)
            axes.axvline(end - 0.5, color="black", linewidth=0.8)
        axes.set(title=f"image with {count} objects", xlabel="is seen", ylabel="sees")
    figure.savefig(path, dpi=100)


def draw_curves(path: Path, study: Path) -> None:
    """AP over the epochs of each detector of a study, without denoising and with it."""
    content = json.loads(study.read_text(encoding="utf-8"))
    detectors = list(dict.fromkeys(row["detector"] for row in content["rows"]))
    columns = min(3, len(detectors))
    lines = math.ceil(len(detectors) / columns)
    figure = Figure(figsize=(8, 0.4 + 2.2 * lines), layout="constrained")
    places = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes in places[len(detectors) :]:
        axes.remove()
    for axes, detector in zip(places, detectors, strict=False):
        for row in (row for row in content["rows"] if row["detector"] == detector):
            label, colour = ("with", "C2") if row["denoising"] else ("without", "C7")
            epochs = range(1, len(row["AP"]) + 1)
            axes.plot(epochs, row["AP"], "o-", markersize=3, color=colour, label=label)
        axes.set(title=detector, xticks=list(epochs))
        axes.grid(alpha=0.3)
    places[0].legend(title="denoising")
    figure.supxlabel("epoch")
    figure.supylabel("AP on the digits")
    figure.savefig(path, dpi=100)


def _draw_box(axes: Axes, box_cxcywh: Tensor, colour: str, width: float) -> None:
    x1, y1, x2, y2 = box_cxcywh_to_xyxy(box_cxcywh).tolist()
    shape = Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ec=colour, lw=width)
    axes.add_patch(shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for noise.png and the others")
    parser.add_argument("--study", type=Path, default=STUDY, help="JSON file of the curves")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    draw_noise(arguments.folder / "noise.png")
    draw_mask(arguments.folder / "mask.png")
    if arguments.study.exists():
        draw_curves(arguments.folder / "curves.png", arguments.study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
