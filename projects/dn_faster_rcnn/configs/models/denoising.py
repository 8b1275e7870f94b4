"""What makes DN of Faster R-CNN: boxes are noised, there is no query that could carry a label."""

from dn_detr.config import LazyCall as L
from dn_detr.modeling import QueryDenoising

denoising = L(QueryDenoising)(
    num_classes="${model.num_classes}",
    num_groups=10,
    label_noise=0.0,
    box_noise=0.4,
    max_queries=500,
)
