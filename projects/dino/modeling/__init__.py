"""What DINO adds to the library."""

from .denoising import ContrastiveDenoising
from .layouts import DinoDetrexLayout, DinoLayout, DnDetrDinoLayout
from .queries import MixedQueries

__all__ = [
    "ContrastiveDenoising",
    "DinoDetrexLayout",
    "DinoLayout",
    "DnDetrDinoLayout",
    "MixedQueries",
]
