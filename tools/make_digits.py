"""Make the demo data set: handwritten digits on photographs, in COCO's layout.

    python tools/make_digits.py --root datasets/digits
    python tools/make_digits.py --root datasets/digits --num-train 5000 --digits-per-image 3 9

The digits are the 1797 scans of 8x8 pixels and 16 gray levels of scikit-learn's `load_digits`
(the test part of the UCI set "Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998); the backgrounds are crops of the two photographs of `load_sample_images`
(china.jpg, flower.jpg; CC BY). Both come with scikit-learn (`pip install 'dn_detr[demo]'`), so
nothing is downloaded. A data set of the same settings is reused.
"""

from __future__ import annotations

import argparse
import colorsys
import inspect
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FloatArray = NDArray[np.float32]
BoxXYWH = tuple[int, int, int, int]

FORMAT_VERSION = 1  # raise it when the same settings start to give other images
STAMP_FILE = "digits_dataset.json"
TRAIN_FRACTION = 0.8  # of the scans; the others are seen in validation only
PLACEMENT_TRIES = 40
JPEG_QUALITY = 92
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601


@dataclass(frozen=True)
class SceneRecipe:
    """What one image looks like.

    Attributes:
        image_size: side of the square image, in pixels.
        digits_per_image: smallest and largest number of digits.
        digit_size: smallest and largest height of a digit, in pixels (strokes that fade out may
            take a few pixels off), at most half of `image_size`.
        max_overlap: how much of a digit's box one other box may cover, in [0, 1).
    """

    image_size: int = 128
    digits_per_image: tuple[int, int] = (1, 6)
    digit_size: tuple[int, int] = (20, 48)
    max_overlap: float = 0.15

    def __post_init__(self) -> None:
        fewest, most = self.digits_per_image
        smallest, largest = self.digit_size
        if not 1 <= fewest <= most:
            raise ValueError(f"digits_per_image={self.digits_per_image}: give 1 <= low <= high")
        if not 8 <= smallest <= largest <= self.image_size // 2:
            raise ValueError(
                f"digit_size={self.digit_size}: give 8 (the height of a scan) <= low <= high "
                f"<= {self.image_size // 2} (half of image_size={self.image_size})"
            )
        if not 0 <= self.max_overlap < 1:
            raise ValueError(f"max_overlap={self.max_overlap}: give a number in [0, 1)")


@dataclass(frozen=True)
class DigitScans:
    """Handwritten digits: `ink` (N, 8, 8) float32 in [0, 1] and `labels` (N,) int in [0, 10)."""

    ink: FloatArray
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: NDArray[np.int64]) -> DigitScans:
        return DigitScans(self.ink[index], self.labels[index])


@dataclass(frozen=True)
class Scene:
    """An image with the boxes (x, y, width, height; pixels) and labels of its digits."""

    image: Image.Image
    boxes_xywh: list[BoxXYWH]
    labels: list[int]


def write_digits_dataset(
    root: str | Path,
    *,
    num_train: int = 2000,
    num_val: int = 200,
    image_size: int = SceneRecipe.image_size,
    digits_per_image: tuple[int, int] = SceneRecipe.digits_per_image,
    digit_size: tuple[int, int] = SceneRecipe.digit_size,
    max_overlap: float = SceneRecipe.max_overlap,
    seed: int = 0,
) -> Path:
    """Write the data set below `root`, unless it lies there already with the same settings.

    The folder appears complete or not at all. Every image is a function of the settings, the
    seed and its index; no digit scan of a training image appears in a validation image.

    Args:
        root: folder of the data set; gets `train2017/`, `val2017/` and `annotations/`.
        num_train: number of training images.
        num_val: number of validation images.
        image_size: see `SceneRecipe`, as the three below.
        digits_per_image: smallest and largest number of digits in an image.
        digit_size: smallest and largest height of a digit, in pixels.
        max_overlap: how much of a digit's box one other box may cover, in [0, 1).
        seed: of all random draws.

    Returns:
        `root` as a path.

    Raises:
        ValueError: a setting is out of range, or `root` holds something else.
        ImportError: scikit-learn is missing.
    """
    root = Path(root)
    if num_train < 1 or num_val < 1:
        raise ValueError(f"num_train={num_train}, num_val={num_val}: give at least 1 of each")
    recipe = SceneRecipe(image_size, digits_per_image, digit_size, max_overlap)
    settings = {"num_train": num_train, "num_val": num_val, **asdict(recipe), "seed": seed}
    stamp = json.dumps({"format": FORMAT_VERSION, **settings}, indent=1)
    if _read_stamp(root) == stamp:
        return root

    scans, photos = _load_scans(), _load_photos()
    order = np.random.default_rng(seed).permutation(len(scans))
    boundary = round(TRAIN_FRACTION * len(scans))
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as workspace:
        fresh = Path(workspace) / "fresh"
        (fresh / "annotations").mkdir(parents=True)
        for split, part, count in (
            (0, order[:boundary], num_train),
            (1, order[boundary:], num_val),
        ):
            rngs = (np.random.default_rng([seed, split, index]) for index in range(count))
            scenes = (draw_scene(recipe, scans[part], photos, rng) for rng in rngs)
            _write_split(fresh, ("train2017", "val2017")[split], list(scenes))
        (fresh / STAMP_FILE).write_text(stamp, encoding="utf-8")
        if root.exists():
            root.rename(Path(workspace) / "outdated")  # deleted with the workspace
        fresh.rename(root)
    return root


def draw_scene(
    recipe: SceneRecipe,
    scans: DigitScans,
    photos: list[Image.Image],
    rng: np.random.Generator,
) -> Scene:
    """Draw digits of random size, colour and position on a random crop of a photograph.

    Args:
        recipe: what the image looks like.
        scans: the digits to choose from.
        photos: the backgrounds to choose from, RGB, each side larger than 2 pixels.
        rng: source of all random draws.

    Returns:
        The scene. A digit that finds no free place is left out, never the first one.
    """
    canvas = _random_background(photos, recipe.image_size, rng)
    boxes: list[BoxXYWH] = []
    labels: list[int] = []
    low, high = recipe.digits_per_image
    for _ in range(int(rng.integers(low, high + 1))):
        index = int(rng.integers(len(scans)))
        height = int(rng.integers(recipe.digit_size[0], recipe.digit_size[1] + 1))
        alpha = _upscale(scans.ink[index], height, float(rng.uniform(0.85, 1.15)))
        box = _find_place(alpha, boxes, recipe, rng)
        if box is not None:
            _paint(canvas, alpha, box, rng)
            boxes.append(box)
            labels.append(int(scans.labels[index]))
    pixels = np.round(canvas * 255).astype(np.uint8)
    return Scene(Image.fromarray(pixels), boxes, labels)


def _random_background(
    photos: list[Image.Image], size: int, rng: np.random.Generator
) -> FloatArray:
    """A random square crop of a photo, (size, size, 3) in [0, 1], with its contrast lowered."""
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(min(photo.size) // 3, min(photo.size)))
    left = int(rng.integers(photo.width - side + 1))
    top = int(rng.integers(photo.height - side + 1))
    crop = photo.resize(
        (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    pixels = np.asarray(crop, dtype=np.float32) / 255
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    # Half of the contrast, so that the ink stays readable on top of leaves and roof tiles.
    mean = pixels.mean(axis=(0, 1))
    return np.ascontiguousarray(mean + rng.uniform(0.4, 0.7) * (pixels - mean), dtype=np.float32)


def _upscale(ink: FloatArray, height: int, stretch: float) -> FloatArray:
    """Enlarge a scan (8, 8) to an opacity map (about `height`, w), cut to the visible ink."""
    ink = np.pad(_cut_to_ink(ink, 1 / 16), 1)  # a margin lets the strokes fade out at the rim
    scale = height / (ink.shape[0] - 2)
    size = (round(ink.shape[1] * scale * stretch), round(ink.shape[0] * scale))
    smooth = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC))
    edge = np.clip((smooth - 0.3) / 0.4, 0, 1)
    return _cut_to_ink((edge * edge * (3 - 2 * edge)).astype(np.float32), 0.25)


def _cut_to_ink(alpha: FloatArray, threshold: float) -> FloatArray:
    rows = np.flatnonzero((alpha >= threshold).any(axis=1))
    columns = np.flatnonzero((alpha >= threshold).any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _find_place(
    alpha: FloatArray, taken: list[BoxXYWH], recipe: SceneRecipe, rng: np.random.Generator
) -> BoxXYWH | None:
    """A random box for `alpha` inside the image that overlaps the taken ones moderately."""
    height, width = alpha.shape
    for _ in range(PLACEMENT_TRIES):
        x = int(rng.integers(recipe.image_size - width + 1))
        y = int(rng.integers(recipe.image_size - height + 1))
        box = (x, y, width, height)
        if all(_covered_fraction(box, other) <= recipe.max_overlap for other in taken):
            return box
    return None


def _covered_fraction(a: BoxXYWH, b: BoxXYWH) -> float:
    """Intersection over the area of the smaller box, in [0, 1]; never less than the IoU."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _paint(canvas: FloatArray, alpha: FloatArray, box: BoxXYWH, rng: np.random.Generator) -> None:
    """Blend a coloured digit into `canvas` (H, W, 3): bright where it is dark, else dark."""
    x, y, width, height = box
    patch = canvas[y : y + height, x : x + width]
    dark_below = float((patch @ LUMA).mean()) < rng.uniform(0.4, 0.6)
    hue, saturation = rng.random(), rng.uniform(0.2, 0.9)
    lightness = rng.uniform(0.78, 0.95) if dark_below else rng.uniform(0.05, 0.2)
    colour = np.array(colorsys.hls_to_rgb(hue, lightness, saturation), dtype=np.float32)
    opacity = alpha[..., None] * np.float32(rng.uniform(0.85, 1.0))
    patch += opacity * (colour - patch)


def _write_split(root: Path, name: str, scenes: list[Scene]) -> None:
    """Write the images of one split as JPEG and its annotations as COCO JSON."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / name).mkdir()
    for image_id, scene in enumerate(scenes, start=1):
        file_name = f"{image_id:012d}.jpg"
        scene.image.save(root / name / file_name, quality=JPEG_QUALITY, subsampling=0)
        width, height = scene.image.size
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for box, label in zip(scene.boxes_xywh, scene.labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes annotation id 0 for "no match"
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(coco), encoding="utf-8")


def _read_stamp(root: Path) -> str | None:
    """The settings of the data set below `root`, None if there is no such folder yet."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    stamp = root / STAMP_FILE
    if not stamp.is_file():
        raise ValueError(
            f"{root} exists and is not a digits data set (it has no {STAMP_FILE}), so it is not "
            "replaced: name another folder or remove this one"
        )
    return stamp.read_text(encoding="utf-8")


def _load_scans() -> DigitScans:
    digits = _sklearn_datasets().load_digits()
    return DigitScans((digits.images / 16).astype(np.float32), digits.target.astype(np.int64))


def _load_photos() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in _sklearn_datasets().load_sample_images().images]


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits data set is made from images that come with scikit-learn; install it:"
            " pip install 'dn_detr[demo]' (or pip install scikit-learn)"
        ) from error
    return datasets


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; defaults are those of `write_digits_dataset`."""
    defaults = inspect.signature(write_digits_dataset).parameters
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", required=True, help="folder of the data set")
    for name, meaning in {
        "num_train": "training images",
        "num_val": "validation images",
        "image_size": "side of an image, pixels",
        "seed": "of all random draws",
    }.items():
        parser.add_argument(option(name), type=int, default=defaults[name].default, help=meaning)
    for name, meaning in {
        "digits_per_image": "fewest and most digits in an image",
        "digit_size": "smallest and largest height of a digit, pixels",
    }.items():
        parser.add_argument(
            option(name), type=int, nargs=2, default=defaults[name].default, help=meaning
        )
    parser.add_argument(
        "--max-overlap",
        type=float,
        default=defaults["max_overlap"].default,
        help="how much of a box another may cover, in [0, 1)",
    )
    return parser.parse_args(argv)


def option(name: str) -> str:
    """`num_train` -> `--num-train`."""
    return "--" + name.replace("_", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data set and say where it is; returns the exit code."""
    settings = vars(parse_arguments(argv))
    settings["digits_per_image"] = tuple(settings["digits_per_image"])
    settings["digit_size"] = tuple(settings["digit_size"])
    try:
        root = write_digits_dataset(**settings)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{settings['num_train']} + {settings['num_val']} images lie in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
