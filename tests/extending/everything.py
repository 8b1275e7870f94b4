"""Everything that docs/extending.md brings, in one config; copied into its package by the test."""

from dn_detr.config import LazyCall as L

from ..backbone import ConvBackbone
from ..callbacks import WeightDistance
from ..losses import AreaCost, AreaLoss
from .my_data import dataloader, lr_schedule, optimizer, train  # noqa: F401
from .my_data import model as _model_of_squares
from .my_detector import model

model.num_classes = _model_of_squares.num_classes
model.target_fields = _model_of_squares.target_fields
model.criterion = _model_of_squares.criterion
model.criterion.losses.loss_area = L(AreaLoss)(limit=0.5, weight=1.0)
model.criterion.matcher.costs.cost_area = L(AreaCost)(weight=1.0)
model.backbone = L(ConvBackbone)(width=16)
model.neck.in_channels = [32, 64]
model.neck.in_strides = [8, 16]
train.callbacks.weight_distance = L(WeightDistance)(every=1)
train.output_dir = "output/everything"
