"""Anchor DETR, and with query denoising."""
