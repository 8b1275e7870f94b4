"""50 epochs, with a tenth of the learning rate from epoch 40 on."""

from dn_detr.config import LazyCall as L
from dn_detr.engine import multi_step

from .train import train

lr_schedule = L(multi_step)(milestones=[40], gamma=0.1)
train.epochs = 50
