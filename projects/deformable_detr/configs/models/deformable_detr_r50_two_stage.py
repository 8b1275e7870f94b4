"""Two-stage Deformable DETR with ResNet-50: the encoder proposes the boxes (appendix A.4)."""

from dn_detr.config import LazyCall as L
from dn_detr.configs.models.dab_deformable_detr_r50_two_stage import model as _two_stage

from ...modeling import BoxEmbeddingDecoder
from .deformable_detr_r50_refine import model

model.queries = _two_stage.queries
model.queries.class_agnostic = True
model.queries.content = "zero"
model.transformer.decoder = L(BoxEmbeddingDecoder)(
    layer=model.transformer.decoder.layer,
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
)
model.heads.size_bias = 0.0
