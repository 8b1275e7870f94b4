"""DAB-Deformable-DETR with ResNet-50, two-stage: the encoder proposes the queries.

Zhu et al., "Deformable DETR", 2021, section 4.2 (https://arxiv.org/abs/2010.04159), in the version
of detrex: proposals are ranked and trained with the true classes. 47 530 508 parameters with 80
classes.
"""

from dn_detr.config import LazyCall as L
from dn_detr.modeling import ProposalQueries

from .dab_deformable_detr_r50 import model

model.queries = L(ProposalQueries)(
    num_queries="${model.num_queries}",
    num_classes="${model.num_classes}",
    embed_dim="${model.transformer.embed_dim}",
    base_size=0.05,
    mask_padding=True,
    classification="${model.classification}",
    content="proposed",
)
model.heads.size_bias = 0.0
