"""The errors of this room."""

from __future__ import annotations


class DatasetError(ValueError):
    """A data set, annotation file or image that cannot be used: which file, why, what helps."""


class ImageError(DatasetError):
    """An image file that is missing, damaged, or not the one that was annotated."""
