"""The layouts that can be written, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dn_detr.checkpoint import DetrexLayout, OfficialLayout

LAYOUTS = {"official": OfficialLayout(), "detrex": DetrexLayout()}


def to_layout(state: Mapping[str, Tensor], layout: str, **options: Any) -> dict[str, Tensor]:
    """Our state under the names of another code base."""
    return LAYOUTS[layout].to_theirs(state, **options)
