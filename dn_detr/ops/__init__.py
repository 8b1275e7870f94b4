"""Registered operators (`torch.ops.dn_detr.*`), their Python face and the choice of kernels."""

from __future__ import annotations

from .library import build_info, missing_kernels, use_kernels
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

__all__ = ["build_info", "missing_kernels", "ms_deform_attn", "ms_deform_attn_fused", "use_kernels"]
