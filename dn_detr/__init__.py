"""A LazyConfig model zoo for DN-DETR: query-denoising training for DETR-like detectors."""

__version__ = "0.1.0"
