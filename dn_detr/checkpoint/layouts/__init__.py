"""The names that other code bases give to the tensors of a model: one module for each."""

from .detectron2 import Detectron2Layout as Detectron2Layout
from .detrex import DetrexLayout as DetrexLayout
from .huggingface import HuggingFaceLayout as HuggingFaceLayout
from .layout import Layout as Layout
from .layout import OwnLayout as OwnLayout
from .layout import Translation as Translation
from .layout import as_layouts as as_layouts
from .official import OfficialLayout as OfficialLayout
from .torchvision import TorchvisionLayout as TorchvisionLayout
