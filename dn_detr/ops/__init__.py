"""Registered operators (`torch.ops.dn_detr.*`), their Python face and the choice of kernels."""

from __future__ import annotations

from .library import build_info as build_info
from .library import missing_kernels as missing_kernels
from .library import use_kernels as use_kernels
from .ms_deform_attn import ms_deform_attn as ms_deform_attn
from .ms_deform_attn import ms_deform_attn_fused as ms_deform_attn_fused
