"""A complete config around the tiny detector; tests change it by overrides."""

import torch
from omegaconf import OmegaConf

from dn_detr.config import LazyCall as L
from dn_detr.data import build_test_loader, build_train_loader
from dn_detr.engine import TrainSettings, multi_step, parameter_groups
from tests.engine.dummy import TinyDataset, TinyDetector, TinyEvaluator

model = L(TinyDetector)(num_classes=2, dropout=0.1, nan_at=-1, nan_rank=0)
dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(TinyDataset)(length=12),
        total_batch_size=4,
        num_workers=0,
        seed="${train.seed}",
    ),
    test=L(build_test_loader)(dataset=L(TinyDataset)(length=5), batch_size=2, num_workers=0),
    evaluator=L(TinyEvaluator)(),
)
optimizer = L(torch.optim.AdamW)(
    params=L(parameter_groups)(lr="${..lr}", lr_factors={"backbone": 0.1}),
    lr=1e-2,
    weight_decay=1e-4,
)
lr_schedule = L(multi_step)(milestones=[2], gamma=0.1)
train = OmegaConf.structured(TrainSettings)
train.device = "cpu"
train.epochs = 3
train.log_period = 2
train.amp.dtype = "bfloat16"
train.ema.decay = 0.9
train.grace_seconds = 60
train.wandb.update(project="tests", mode="offline")
