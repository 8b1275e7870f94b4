"""What DINO adds to the library."""

from .denoising import ContrastiveDenoising
from .layouts import DinoDetrexLayout, DinoLayout
from .queries import MixedQueries

__all__ = ["ContrastiveDenoising", "DinoDetrexLayout", "DinoLayout", "MixedQueries"]
