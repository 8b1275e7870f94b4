"""What makes DN-Anchor-DETR of Anchor DETR: the queries embed noised objects themselves."""

from dn_detr.configs.models.parts import denoising

denoising.embed = None
