"""A complete config around a small DN-Deformable-DETR; tests change it by overrides."""

from dn_detr.config import LazyCall as L
from dn_detr.data import build_test_loader, build_train_loader
from tests.engine.dummy import TinyEvaluator
from tests.engine.faults import faulty
from tests.engine.small import DrawnScenes, small_detector

from .tiny_config import lr_schedule, optimizer, train

model = L(faulty)(model=small_detector(), kind="nan_loss", bad_images=[], inside="")
dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(DrawnScenes)(length=32, nan_images=[], huge_images=[]),
        total_batch_size=4,
        num_workers=0,
        seed="${train.seed}",
    ),
    test=L(build_test_loader)(dataset=L(DrawnScenes)(length=3), batch_size=2, num_workers=0),
    evaluator=L(TinyEvaluator)(),
)
optimizer.lr = 1e-3
lr_schedule.milestones = []
train.epochs = 1
train.eval_period = 0
train.checkpoint.period = 0
train.log_period = 1
