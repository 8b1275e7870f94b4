"""AdamW as published: one rate for the transformer, a tenth of it for the backbone."""

from torch.optim import AdamW

from dn_detr.config import LazyCall as L
from dn_detr.engine import parameter_groups

# params.model is the model, filled in when training starts.
optimizer = L(AdamW)(
    params=L(parameter_groups)(lr="${optimizer.lr}", lr_factors={"backbone": 0.1}),
    lr=1e-4,
    weight_decay=1e-4,
)
