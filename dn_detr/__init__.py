"""A LazyConfig model zoo for DN-DETR: query-denoising training for DETR-like detectors."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `dn_detr.model_zoo` when it is first used: `import dn_detr` needs no torch."""
    if name == "model_zoo":
        from importlib import import_module

        return import_module("dn_detr.model_zoo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
