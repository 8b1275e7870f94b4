"""The tiny config, long enough to be interrupted where a test sets `model.pause`."""

from dn_detr.config import LazyCall as L
from tests.tools.slow_detector import SlowDetector

# All of it is a part of this config.
from ..engine.tiny_config import dataloader, lr_schedule, optimizer, train  # noqa: F401

model = L(SlowDetector)(num_classes=2, dropout=0.1, nan_at=-1, nan_rank=0, pause=0.0)
train.update(epochs=20, eval_period=None, log_period=2)  # 60 iterations
# Saved are only the end and what a test asks for.
train.checkpoint.period = None
