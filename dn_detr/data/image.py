"""Reading one image file into 8-bit RGB, with the pixels turned as the annotations expect."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import ImageError

# Without those whose readers start programs, such as EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what makes the image upright. 1 and unknown values mean: as stored.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Grayscale becomes three equal channels, CMYK and palettes are converted, an alpha channel is
    dropped (the stored colours stay, as in detectron2), 16-bit grayscale is scaled to 8 bit. Of
    an animation the first frame is read.

    The EXIF orientation is applied, unless only the stored pixels have the size that the
    annotations speak of: then the boxes were drawn on those and they are kept as they are.

    Args:
        path: image file in one of Pillow's `FORMATS`.
        expected_size: (height, width) in pixels that the annotation file claims, None = any.

    Returns:
        Image in mode RGB, of `expected_size` if that is given.

    Raises:
        ImageError: the file is missing, empty, truncated or no image, its pixels have no 8-bit
            meaning, or its size contradicts `expected_size` in either orientation.
    """
    path = Path(path)
    if not os.path.isfile(path):  # False for a name that is too long, too
        raise ImageError(f"{path}: image file is missing")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: image file is empty (zero bytes); fetch it again")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if expected_size is None or tuple(expected_size) in ((height, width), (width, height)):
                image.load()
                stored = _to_rgb(image)
                candidates = [_turned(stored, _orientation(image)), stored]
            else:
                candidates = []
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        raise ImageError(
            f"{path}: cannot be read as an 8-bit RGB image ({type(error).__name__}: {error});"
            " it is truncated, damaged or of an unusual kind: fetch it again, convert it, or"
            " remove it from the annotation file"
        ) from error
    for candidate in candidates:
        if expected_size is None or tuple(expected_size) == (candidate.height, candidate.width):
            return candidate
    assert expected_size is not None  # else the first candidate was right
    raise ImageError(
        f"{path}: the image is {width}x{height} (width x height), the annotation"
        f" file says {expected_size[1]}x{expected_size[0]}; correct 'width' and 'height' (and"
        " the boxes, if the image was resized) or restore the original file"
    )


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB as `read_image` does, with its EXIF orientation applied.

    Raises:
        ValueError: its pixels have no 8-bit meaning.
    """
    return _turned(_to_rgb(image), _orientation(image))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data of an image whose pixels are fine
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion clips everything above 255 to white."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("32-bit pixels outside 0..65535")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
