"""DETR with learned queries, and with query denoising."""
