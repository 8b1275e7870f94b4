"""DINO as the DN-DETR repository has it, one-stage: DN-Deformable-DETR with contrastive denoising.

https://github.com/IDEA-Research/DN-DETR, `dn_dab_dino_deformable_detr`. Negatives have the label
"nothing", and the noise is DN-DETR's.
"""

from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dn_deformable_detr_r50 import model

from ...modeling import ContrastiveDenoising

model.transformer.decoder.look_forward_twice = True
model.denoising = L(ContrastiveDenoising)(
    num_classes="${model.num_classes}",
    embed=model.denoising.embed,
    num_groups=100,
    label_noise=0.2,
    box_noise=0.4,
    max_queries=200,
    mask_empty_slots=True,
    unlabelled_negatives=True,
)
model.postprocess.num_select = 300
