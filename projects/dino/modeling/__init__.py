"""What DINO adds to the library."""

from .denoising import ContrastiveDenoising
from .layouts import DinoDetrexLayout, DinoLayout, DnDetrDinoLayout

__all__ = [
    "ContrastiveDenoising",
    "DinoDetrexLayout",
    "DinoLayout",
    "DnDetrDinoLayout",
]
