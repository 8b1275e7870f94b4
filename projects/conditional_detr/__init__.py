"""Conditional DETR, with and without query denoising."""
