"""DINO as the DN-DETR repository has it, two-stage.

Class 0 of a cell says how much it looks like an object.
"""

from dn_detr.config import LazyCall as L

from ...modeling import DnDetrDinoLayout
from .dino_r50 import model as _dino
from .dn_dino_r50 import model

model.queries = _dino.queries
model.queries.class_agnostic = True
model.denoising.embed.indicator = True  # although the matching queries have none
model.heads.size_bias = 0.0
model.key_maps[0] = L(DnDetrDinoLayout)()
