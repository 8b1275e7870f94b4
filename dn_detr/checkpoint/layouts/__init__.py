"""The names that other code bases give to the tensors of a model: one module for each."""

from .detectron2 import Detectron2Layout
from .detrex import DetrexLayout
from .huggingface import HuggingFaceLayout
from .layout import Layout, OwnLayout, Translation, as_layouts
from .official import OfficialLayout
from .torchvision import TorchvisionLayout

__all__ = [
    "Detectron2Layout",
    "DetrexLayout",
    "HuggingFaceLayout",
    "Layout",
    "OfficialLayout",
    "OwnLayout",
    "TorchvisionLayout",
    "Translation",
    "as_layouts",
]
