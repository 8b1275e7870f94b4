"""A small DINO that learns handwritten digits, 5 epochs; no published AP.

The sizes, the data and the schedule are those of `digits_dn_deformable_detr`.

    python tools/train_net.py --config-file digits_dino

Weights: none published
"""

from dn_detr.configs.digits_dn_deformable_detr import dataloader, lr_schedule, optimizer, train
from dn_detr.configs.digits_dn_deformable_detr import model as _small

from .models.dino_r50 import model

model.num_classes = _small.num_classes
model.num_queries = _small.num_queries
for _part in ("backbone", "neck", "position_embedding"):
    model[_part] = _small[_part]
model.transformer.embed_dim = _small.transformer.embed_dim
model.transformer.encoder = _small.transformer.encoder
for _name in ("num_layers", "layer"):
    model.transformer.decoder[_name] = _small.transformer.decoder[_name]
model.denoising.max_queries = 60
