"""Draw what a trained model finds beside the ground truth, and the curves of its training.

    python tools/make_pictures.py --run output/demo
    python tools/make_pictures.py --run output/demo --images 4 --score-threshold 0.2

Reads `config.yaml`, the last checkpoint and `metrics.jsonl` of the run; writes `predictions.png`
and `curves.png` beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from dn_detr.checkpoint import load_model_weights
from dn_detr.config import LazyConfig, instantiate
from dn_detr.data import CocoDetection
from dn_detr.evaluation.pictures import mosaic, plot_curves, read_metrics


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of a training run")
    parser.add_argument("--images", type=int, default=12, help="how many test images to draw (12)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.4, help="lowest score to draw (0.4)"
    )
    return parser.parse_args(argv)


def draw_predictions(run: Path, count: int, score_threshold: float) -> Image.Image:
    """Draw the first `count` test images with the last weights of a run, on the CPU."""
    cfg = LazyConfig.load(str(run / "config.yaml"))
    model = instantiate(cfg.model).eval()
    load_model_weights(model, run)
    inputs = instantiate(cfg.dataloader.test, num_workers=0, limit=count).dataset
    # The same images as they are in the file, with their objects.
    truth = CocoDetection(inputs.image_dir, inputs.annotation_file, train=True)
    with torch.inference_mode():
        predictions = [model([inputs[i]])[0]["instances"] for i in range(len(inputs))]
    samples = [truth[i] for i in range(len(inputs))]
    return mosaic(
        [to_pil_image(sample["image"]) for sample in samples],
        predictions,
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
        picture = draw_predictions(run, arguments.images, arguments.score_threshold)
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
