"""Augmentation of the DETR family, from small callables.

A transform takes `(sample, rng)` and returns a new sample. A sample is a dict with `image`, an RGB
image of Pillow, and in training `instances`, whose fields have one entry per object. What lies on
the image is a `torchvision.tv_tensors.TVTensor` (`BoundingBoxes`, `Mask`, `KeyPoints`, or a kind
that was registered with `torchvision.transforms.v2.functional.register_kernel`), in the sample or
in a field of its instances, and moves with the image; everything else stays as it is. No object is
removed on the way: a box that a crop cuts off comes back with zero width or height, and the data
set drops the object at the end. All random numbers come from `rng`.

Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 4 and its
reference code, which DN-DETR uses unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import TVTensor

from dn_detr.structures import Instances

_LARGEST_SIDE = 100_000  # pixels

Sample = dict[str, Any]
Transform = Callable[[Sample, random.Random], Sample]


def move(sample: Sample, function: Callable[[Any], Any]) -> Sample:
    """Apply a geometric function to the image of a sample and to all that lies on it.

    Args:
        sample: with `image`; see the module.
        function: takes an image or a `TVTensor` and returns it moved, such as
            `torchvision.transforms.v2.functional.horizontal_flip`.

    Returns:
        A new sample; what the function does not move is shared with the given one.
    """

    def moved(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: function(value) if isinstance(value, TVTensor) else value
            for name, value in fields.items()
        }

    image = function(sample["image"])
    result = {**moved(sample), "image": image}
    if "instances" in sample:
        fields = moved(sample["instances"].get_fields())
        result["instances"] = Instances((image.height, image.width), **fields)
    return result


def resized_size(
    height: int, width: int, short_side: int, max_size: int | None = None
) -> tuple[int, int]:
    """Size of an image after its short side is brought to `short_side` pixels.

    The long side is truncated, not rounded. Where it would exceed `max_size`, the short side
    is first reduced to `round(max_size * short / long)`. Because of that rounding the long side
    may then differ from `max_size`, by a few pixels for the proportions of photographs.

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


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize to `size` (height, width); the image bilinearly with Pillow's antialiasing."""
    return move(sample, partial(F.resize, size=list(size)))


def horizontal_flip(sample: Sample) -> Sample:
    """Mirror left to right."""
    return move(sample, F.horizontal_flip)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut out a region, in pixels; boxes are clipped, those outside it lose width or height."""
    return move(sample, partial(F.crop, top=top, left=left, height=height, width=width))


@dataclass(frozen=True)
class RandomFlip:
    """Mirror with the given probability; one draw."""

    probability: float

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return horizontal_flip(sample) if rng.random() < self.probability else sample


@dataclass(frozen=True)
class RandomResize:
    """Resize the short side to one of `short_sides`; one draw (see `resized_size`)."""

    short_sides: tuple[int, ...]
    max_size: int | None = None

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        short_side = rng.choice(self.short_sides)
        image = sample["image"]
        return resize(sample, resized_size(image.height, image.width, short_side, self.max_size))


@dataclass(frozen=True)
class RandomCrop:
    """Crop a region with sides in [min_size, max_size] at a uniform place.

    Draws width, height, top, left, in this order. A side never exceeds the image, also where the
    image is smaller than `min_size`.
    """

    min_size: int
    max_size: int

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        image = sample["image"]
        width, height = (
            rng.randint(min(self.min_size, side), min(self.max_size, side)) for side in image.size
        )
        top = rng.randint(0, image.height - height)
        left = rng.randint(0, image.width - width)
        return crop(sample, top, left, height, width)


@dataclass(frozen=True)
class Compose:
    """Apply transforms one after the other."""

    steps: tuple[Transform, ...]

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        for step in self.steps:
            sample = step(sample, rng)
        return sample


@dataclass(frozen=True)
class OneOf:
    """Apply `first` with the given probability, else `second`; one draw."""

    probability: float
    first: Transform
    second: Transform

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        branch = self.first if rng.random() < self.probability else self.second
        return branch(sample, rng)


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
        ValueError: a size or `scale` is not positive or too large, a probability is outside [0, 1],
            or a list of sizes is empty or `crop_range` is reversed.

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
        scale: multiplies both sizes; rounded as in `train_transforms`.
        short_side: length of the short side, pixels.
        max_size: limit of the long side, pixels.

    Raises:
        ValueError: a size or `scale` is not positive or too large.
    """
    return RandomResize(_scaled([short_side], scale), _scaled([max_size], scale)[0])


# Its name begins with "test": keep pytest from collecting it where it is imported.
test_transforms.__test__ = False  # type: ignore[attr-defined]


def _scaled(sizes: Sequence[int], scale: float) -> tuple[int, ...]:
    if not sizes or min(sizes) <= 0 or not 0 < scale * max(sizes) <= _LARGEST_SIDE:
        raise ValueError(
            "sizes of the augmentation times their scale (dataloader.image_scale) must be positive"
            f" and at most {_LARGEST_SIDE} pixels, got sizes={list(sizes)}, scale={scale}"
        )
    return tuple(max(1, round(size * scale)) for size in sizes)
