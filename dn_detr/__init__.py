"""A LazyConfig model zoo for DN-DETR: query-denoising training for DETR-like detectors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import model_zoo as model_zoo
    from .predictor import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `model_zoo` and `load` when they are first used: `import dn_detr` needs no torch."""
    if name == "model_zoo":
        return import_module("dn_detr.model_zoo")
    if name == "load":
        return import_module("dn_detr.predictor").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
