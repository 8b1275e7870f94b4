"""12 epochs, with a tenth of the learning rate from epoch 11 on."""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .train import train

lr_schedule = L(multi_step)(milestones=[11], gamma=0.1)
train.epochs = 12
