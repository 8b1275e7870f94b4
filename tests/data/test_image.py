from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps

from dn_detr.data import DatasetError, read_image

HEIGHT, WIDTH = 6, 9


def gradient(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).convert(mode)


def save(folder: Path, image: Image.Image, name: str = "image.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def save_with_orientation(folder: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(folder, gradient(), exif=exif)


def test_rgb_is_read_unchanged(tmp_path: Path) -> None:
    image = read_image(save(tmp_path, gradient()), expected_size=(HEIGHT, WIDTH))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grayscale_gives_three_equal_channels(tmp_path: Path, mode: str) -> None:
    gray = gradient("L").convert(mode)
    channels = np.asarray(read_image(save(tmp_path, gray)))
    expected = np.asarray(gray.convert("L"))
    np.testing.assert_array_equal(channels, np.repeat(expected[:, :, None], 3, axis=2))


def test_cmyk_jpeg_is_converted_to_its_colours(tmp_path: Path) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = read_image(save(tmp_path, red, "image.jpg", quality=95))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[8, 8], [255, 0, 0], atol=4)


@pytest.mark.parametrize(("name", "dtype"), [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2")])
def test_16_bit_grayscale_is_scaled_and_not_clipped(tmp_path: Path, name: str, dtype: str) -> None:
    values = np.array([[0, 257, 300, 32768, 65535]])
    path = save(tmp_path, Image.fromarray(values.astype(dtype)), name)
    channels = np.asarray(read_image(path))
    np.testing.assert_array_equal(channels[0, :, 0], [0, 1, 1, 128, 255])


def test_32_bit_pixels_that_fit_16_bit_are_read_as_such(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[0, 65535]], np.int32)), "a.tif")
    assert np.asarray(read_image(path)).max() == 255


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_8_bit_meaning_are_refused(tmp_path: Path, dtype: type) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[0, 70000]], dtype)), "deep.tif")
    with pytest.raises(DatasetError, match=r"deep\.tif"):
        read_image(path)


def test_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    path = save(tmp_path, palette, transparency=bytes([255, 0]))
    np.testing.assert_array_equal(np.asarray(read_image(path))[0], [[10, 20, 30], [200, 100, 50]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    path = save_with_orientation(tmp_path, orientation)
    expected = ImageOps.exif_transpose(Image.open(path))
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(expected))
    size = (expected.height, expected.width)
    np.testing.assert_array_equal(np.asarray(read_image(path, size)), np.asarray(expected))


def test_exif_orientation_is_ignored_when_boxes_were_drawn_on_stored_pixels(
    tmp_path: Path,
) -> None:
    image = read_image(save_with_orientation(tmp_path, 6), expected_size=(HEIGHT, WIDTH))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(gradient()))


def test_damaged_exif_does_not_hide_the_pixels(tmp_path: Path) -> None:
    path = save(tmp_path, gradient(), "image.jpg", exif=b"Exif\x00\x00MM\x00garbage")
    assert read_image(path).size == (WIDTH, HEIGHT)


def test_size_that_contradicts_the_annotations_names_file_and_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"image\.png: the image is 9x6.* says 8x6"):
        read_image(save(tmp_path, gradient()), expected_size=(6, 8))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.jpg: image file is missing"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(DatasetError, match="image file is missing"):
        read_image("x" * 300)


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DatasetError, match=r"empty\.jpg: .*zero bytes"):
        read_image(tmp_path / "empty.jpg")


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path: Path, name: str, kept: float) -> None:
    path = save(tmp_path, gradient().resize((200, 200)), name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DatasetError, match=rf"{name}: cannot be read"):
        read_image(path)


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(DatasetError, match=r"page\.jpg: cannot be read"):
        read_image(tmp_path / "page.jpg")


def test_formats_whose_reader_starts_a_program_are_not_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = save(tmp_path, gradient(), "image.eps").rename(tmp_path / "image.jpg")
    with pytest.raises(DatasetError, match=r"image\.jpg: cannot be read"):
        read_image(path)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif", "ppm", "jp2"])
def test_the_formats_of_the_documentation_are_read(tmp_path: Path, suffix: str) -> None:
    image = read_image(save(tmp_path, gradient(), f"image.{suffix}"), (HEIGHT, WIDTH))
    assert image.size == (WIDTH, HEIGHT)


def test_an_image_of_another_size_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Image.new("1", (13000, 13000)), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(DatasetError, match=r"bomb\.png: the image is 13000x13000.* says 8x6"):
        read_image(path, expected_size=(6, 8))
