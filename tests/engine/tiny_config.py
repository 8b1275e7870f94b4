"""A complete config around the tiny detector; tests change it by overrides."""

import torch

from dn_detr.config import LazyCall as L
from dn_detr.data import build_test_loader, build_train_loader
from dn_detr.engine import multi_step, parameter_groups
from tests.engine.dummy import TinyDataset, TinyDetector, TinyEvaluator

model = L(TinyDetector)(num_classes=2, dropout=0.1, nan_at=-1, nan_rank=0, kill_at=-1)
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
train = dict(
    output_dir="output",
    init_checkpoint="",
    device="cpu",
    seed=42,
    epochs=3,
    max_iter=None,
    max_hours=None,
    eval_period="1ep",
    log_period=2,
    amp=dict(enabled=False, dtype="bfloat16"),
    clip_grad=dict(max_norm=0.1, norm_type=2.0),
    accumulate=1,
    activation_checkpointing=dict(backbone=False, encoder=False, decoder=False),
    ema=dict(enabled=False, decay=0.9),
    nonfinite="raise",
    nonfinite_limit=10,
    oom="raise",
    grace_seconds=60.0,
    checkpoint=dict(period="1ep", keep=3, best="AP", asynchronous=True),
    early_stopping=dict(patience=None, min_delta=0.0),
    wandb=dict(enabled=False, project="tests", name=None, mode="offline"),
)
