"""DINO with ResNet-50, four scales.

Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
2022 (https://arxiv.org/abs/2203.03605), as its repository has it.
"""

from dn_detr.checkpoint import Detectron2Layout, TorchvisionLayout
from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dab_deformable_detr_r50_two_stage import model
from dn_detr.configs.models.parts import denoising as _denoising

from ...modeling import ContrastiveDenoising, DinoDetrexLayout, DinoLayout

model.num_queries = 900
model.position_embedding.temperature = 20
model.position_embedding.offset = 0.0
model.queries.content = "learned"  # mixed query selection
model.transformer.decoder.final_norm = True
model.transformer.decoder.look_forward_twice = True
model.transformer.decoder.query_scale = False
model.heads.shared = True
_denoising.embed.indicator = False
model.denoising = L(ContrastiveDenoising)(
    num_classes="${model.num_classes}",
    embed=_denoising.embed,
    num_groups=100,
    label_noise=0.25,
    box_noise=1.0,
    max_queries=200,
    mask_empty_slots=True,
)
model.postprocess.num_select = 300
model.key_maps = [
    L(DinoLayout)(),
    L(DinoDetrexLayout)(),
    L(TorchvisionLayout)(),
    L(Detectron2Layout)(),
]
