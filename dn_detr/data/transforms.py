"""Augmentation of the DETR family, from small callables.

A transform takes ``(image, boxes_xyxy, rng)`` and returns ``(image, boxes_xyxy)``. Boxes are
(N, 4) float32 in absolute pixels of the image; N never changes, so labels stay in step: a box
that a crop cuts off comes back with zero width or height, and whoever holds the labels drops it
(``CocoDetection`` does). All chance comes from ``rng``.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 4 and its
reference code, which DN-DETR uses unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Transform = Callable[[Image.Image, Tensor, random.Random], tuple[Image.Image, Tensor]]


def resized_size(
    height: int, width: int, short_side: int, max_size: int | None = None
) -> tuple[int, int]:
    """Size of an image after its short side is brought to ``short_side`` pixels.

    The long side is truncated, not rounded. Where it would exceed ``max_size``, the short side
    is first reduced to ``round(max_size * short / long)``. Because of that rounding the long side
    may then differ from ``max_size``, by a few pixels for the proportions of photographs.

    Args:
        height: pixels, positive.
        width: pixels, positive.
        short_side: wanted length of the short side in pixels.
        max_size: limit of the long side in pixels, None = no limit.

    Returns:
        (height, width) in pixels, each at least 1.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * short_side > max_size:
        short_side = max(1, round(max_size * short / long))
    if short == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def resize(
    image: Image.Image, boxes_xyxy: Tensor, size: tuple[int, int]
) -> tuple[Image.Image, Tensor]:
    """Resize image and boxes to ``size`` (height, width); bilinear with Pillow's antialiasing."""
    ratios = (size[1] / image.width, size[0] / image.height)
    return F.resize(image, list(size)), boxes_xyxy * torch.tensor(ratios * 2)


def horizontal_flip(image: Image.Image, boxes_xyxy: Tensor) -> tuple[Image.Image, Tensor]:
    """Mirror image and boxes left to right."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    flipped = torch.stack([image.width - x2, y1, image.width - x1, y2], dim=-1)
    return F.horizontal_flip(image), flipped


def crop(
    image: Image.Image, boxes_xyxy: Tensor, top: int, left: int, height: int, width: int
) -> tuple[Image.Image, Tensor]:
    """Cut out a region; boxes are clipped to it, those outside get zero width or height."""
    shifted = boxes_xyxy - torch.tensor([left, top, left, top])
    limits = torch.tensor([width, height, width, height])
    return F.crop(image, top, left, height, width), shifted.clamp(min=0).minimum(limits)


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to a (3, H, W) uint8 tensor; normalising is the model's work."""
    pixels: Tensor = F.pil_to_tensor(image)
    return pixels


@dataclass(frozen=True)
class RandomFlip:
    """Mirror with the given probability; one draw."""

    probability: float

    def __call__(
        self, image: Image.Image, boxes_xyxy: Tensor, rng: random.Random
    ) -> tuple[Image.Image, Tensor]:
        if rng.random() < self.probability:
            return horizontal_flip(image, boxes_xyxy)
        return image, boxes_xyxy


@dataclass(frozen=True)
class RandomResize:
    """Resize the short side to one of ``short_sides``; one draw (see ``resized_size``)."""

    short_sides: tuple[int, ...]
    max_size: int | None = None

    def __call__(
        self, image: Image.Image, boxes_xyxy: Tensor, rng: random.Random
    ) -> tuple[Image.Image, Tensor]:
        short_side = rng.choice(self.short_sides)
        size = resized_size(image.height, image.width, short_side, self.max_size)
        return resize(image, boxes_xyxy, size)


@dataclass(frozen=True)
class RandomCrop:
    """Crop a region with sides in [min_size, max_size] at a uniform place.

    Draws width, height, top, left, in this order. A side never exceeds the image, also where the
    image is smaller than ``min_size``.
    """

    min_size: int
    max_size: int

    def __call__(
        self, image: Image.Image, boxes_xyxy: Tensor, rng: random.Random
    ) -> tuple[Image.Image, Tensor]:
        width = self._draw_side(image.width, rng)
        height = self._draw_side(image.height, rng)
        top = rng.randint(0, image.height - height)
        left = rng.randint(0, image.width - width)
        return crop(image, boxes_xyxy, top, left, height, width)

    def _draw_side(self, available: int, rng: random.Random) -> int:
        return rng.randint(min(self.min_size, available), min(self.max_size, available))


@dataclass(frozen=True)
class Compose:
    """Apply transforms one after the other."""

    steps: tuple[Transform, ...]

    def __call__(
        self, image: Image.Image, boxes_xyxy: Tensor, rng: random.Random
    ) -> tuple[Image.Image, Tensor]:
        for step in self.steps:
            image, boxes_xyxy = step(image, boxes_xyxy, rng)
        return image, boxes_xyxy


@dataclass(frozen=True)
class OneOf:
    """Apply ``first`` with the given probability, else ``second``; one draw."""

    probability: float
    first: Transform
    second: Transform

    def __call__(
        self, image: Image.Image, boxes_xyxy: Tensor, rng: random.Random
    ) -> tuple[Image.Image, Tensor]:
        branch = self.first if rng.random() < self.probability else self.second
        return branch(image, boxes_xyxy, rng)


def train_transforms(
    scale: float = 1.0,
    *,
    short_sides: Sequence[int] = tuple(range(480, 801, 32)),
    max_size: int = 1333,
    flip_probability: float = 0.5,
    crop_probability: float = 0.5,
    crop_short_sides: Sequence[int] = (400, 500, 600),
    crop_range: tuple[int, int] = (384, 600),
) -> Transform:
    """Flip, then either resize, or resize, crop and resize again.

    Args:
        scale: multiplies every size below; results are rounded to the nearest integer (halves
            to even) and are at least 1.
        short_sides: lengths of the short side to choose from, pixels.
        max_size: limit of the long side after the last resize, pixels.
        flip_probability: of mirroring, in [0, 1].
        crop_probability: of the branch with the crop, in [0, 1].
        crop_short_sides: lengths of the short side before the crop; the long side is not limited.
        crop_range: smallest and largest side of the crop, inclusive, pixels.

    Returns:
        Transform that draws, in this order: flip, branch, then [short side] or [short side
        before the crop, crop width, crop height, top, left, short side].

    Raises:
        ValueError: a size or ``scale`` is not positive, a probability is outside [0, 1], or a
            list of sizes is empty or ``crop_range`` is reversed.

    Source: DETR's reference recipe (480-800 step 32, 1333, 400/500/600, 384-600), the defaults.
    """
    for name, value in (("flip", flip_probability), ("crop", crop_probability)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}_probability must lie in [0, 1], got {value}")
    last_resize = RandomResize(_scaled(short_sides, scale), _scaled([max_size], scale)[0])
    smallest, largest = _scaled(crop_range, scale)
    if smallest > largest:
        raise ValueError(f"crop_range must be (smallest, largest), got {tuple(crop_range)}")
    resize_crop_resize = Compose(
        (
            RandomResize(_scaled(crop_short_sides, scale)),
            RandomCrop(smallest, largest),
            last_resize,
        )
    )
    branch = OneOf(1 - crop_probability, last_resize, resize_crop_resize)
    return Compose((RandomFlip(flip_probability), branch))


def test_transforms(
    scale: float = 1.0, *, short_side: int = 800, max_size: int = 1333
) -> Transform:
    """Resize to a fixed short side, without chance.

    Args:
        scale: multiplies both sizes; rounded as in ``train_transforms``.
        short_side: length of the short side, pixels.
        max_size: limit of the long side, pixels.

    Raises:
        ValueError: a size or ``scale`` is not positive.
    """
    return RandomResize(_scaled([short_side], scale), _scaled([max_size], scale)[0])


# Its name begins with "test": keep pytest from collecting it where it is imported.
test_transforms.__test__ = False  # type: ignore[attr-defined]


def _scaled(sizes: Sequence[int], scale: float) -> tuple[int, ...]:
    if not sizes or min(sizes) <= 0 or not scale > 0:
        raise ValueError(
            f"sizes and scale of the augmentation must be positive, got sizes={list(sizes)},"
            f" scale={scale}"
        )
    return tuple(max(1, round(size * scale)) for size in sizes)
