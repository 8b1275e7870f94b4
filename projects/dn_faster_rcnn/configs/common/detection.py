"""How a Faster R-CNN is trained: SGD, sides of 640 to 800 pixels, no crops, no clipping."""

from torch.optim import SGD

from dn_detr.config import LazyCall as L
from dn_detr.configs.common.coco import dataloader
from dn_detr.configs.common.train import train
from dn_detr.engine import multi_step, parameter_groups

dataloader.train.dataset.transforms.short_sides = [640, 672, 704, 736, 768, 800]
dataloader.train.dataset.transforms.crop_probability = 0.0
dataloader.train.aspect_ratio_grouping = True
optimizer = L(SGD)(
    params=L(parameter_groups)(lr="${optimizer.lr}", lr_factors={}),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)
# detectron2's "1x": 90 000 steps of 16 images, a tenth of the rate from 60 000 and 80 000 on
lr_schedule = L(multi_step)(milestones=[8, 11], gamma=0.1, warmup_epochs=0.135)  # 1000 steps
train.epochs = 12
train.clip_grad.max_norm = None
