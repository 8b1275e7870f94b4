"""Registered operators (``torch.ops.dn_detr.*``) and their Python face."""

from __future__ import annotations

from .ms_deform_attn import ms_deform_attn

__all__ = ["ms_deform_attn"]
