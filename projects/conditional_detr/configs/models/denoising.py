"""Denoising as the DN-DETR paper has it in DETR, whose queries are vectors, too."""

from dn_detr.config import LazyCall as L
from dn_detr.configs.models.parts import denoising
from dn_detr.modeling import VectorQueryEmbedding

denoising.embed = L(VectorQueryEmbedding)(
    num_classes="${model.num_classes}", embed_dim="${model.transformer.embed_dim}"
)
