"""COCO 2017, or your own data in its format and layout, below `dataloader.root`."""

import os

from dn_detr.config import LazyCall as L
from dn_detr.data import (
    CocoDetection,
    build_test_loader,
    build_train_loader,
    test_transforms,
    train_transforms,
)
from dn_detr.evaluation import CocoEvaluator

dataloader = dict(
    root=os.environ.get("COCO_ROOT", "datasets/coco"),
    image_scale=1.0,  # multiplies every size of the augmentation
    train=L(build_train_loader)(
        dataset=L(CocoDetection)(
            image_dir="${dataloader.root}/train2017",
            annotation_file="${dataloader.root}/annotations/instances_train2017.json",
            transforms=L(train_transforms)(
                scale="${dataloader.image_scale}",
                short_sides=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
                max_size=1333,
                flip_probability=0.5,
                crop_probability=0.5,
                crop_short_sides=[400, 500, 600],
                crop_range=[384, 600],
            ),
            train=True,
            seed="${train.seed}",
        ),
        total_batch_size=16,
        num_workers=4,
        limit=None,
        aspect_ratio_grouping=False,
        on_error="raise",  # "skip": take another image where a file cannot be read
        seed="${train.seed}",
    ),
    test=L(build_test_loader)(
        dataset=L(CocoDetection)(
            image_dir="${dataloader.root}/val2017",
            annotation_file="${dataloader.root}/annotations/instances_val2017.json",
            transforms=L(test_transforms)(
                scale="${dataloader.image_scale}", short_side=800, max_size=1333
            ),
            train=False,
        ),
        batch_size=1,
        num_workers=4,
        limit=None,
    ),
    evaluator=L(CocoEvaluator)(output_dir="${train.output_dir}/eval", iou_types=["bbox"]),
)
