"""300 epochs, with a tenth of the learning rate from epoch 200 on."""

from dn_detr.config import LazyCall as L
from dn_detr.configs.common.train import train
from dn_detr.engine import multi_step

lr_schedule = L(multi_step)(milestones=[200], gamma=0.1)
train.epochs = 300
