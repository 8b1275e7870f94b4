"""Exceptions of `dn_detr.data`."""

from __future__ import annotations

from dn_detr.errors import UserError


class DatasetError(UserError):
    """A data set, annotation file or image that cannot be used: which file, why, what helps."""


class ImageError(DatasetError):
    """An image file that is missing, damaged, or not the one that was annotated."""
