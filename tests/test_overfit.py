"""The small model learns two real images by heart."""

from __future__ import annotations

import pytest

from dn_detr.config import LazyConfig, get_config
from dn_detr.engine import train

OVERRIDES = [
    "model.num_classes=80",
    "model.num_queries=40",
    "dataloader.train.limit=2",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.train.dataset.transforms.max_size=128",
    "dataloader.test.limit=2",
    "dataloader.test.batch_size=2",
    "dataloader.test.num_workers=0",
    "dataloader.test.dataset.transforms.max_size=128",
    "train.device=cpu",
    "train.max_iter=200",
    "train.eval_period=0",
    "train.checkpoint.period=0",
]


@pytest.mark.slow
def test_two_real_images_are_learned_by_heart(shared, tmp_path):
    cfg = get_config("digits_dn_deformable_detr.py")
    root = shared / "data/coco_mini"
    cfg = LazyConfig.apply_overrides(
        cfg, [*OVERRIDES, f"dataloader.root={root}", f"train.output_dir={tmp_path}"]
    )
    # Evaluate what was trained on.
    for key in ("image_dir", "annotation_file"):
        cfg.dataloader.test.dataset[key] = cfg.dataloader.train.dataset[key]
    metrics = train(cfg)
    assert metrics["AP50"] >= 0.9
