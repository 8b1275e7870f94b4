"""Real detectors of the zoo, made small, and scenes for them that need no files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from dn_detr.config import LazyConfig, get_config
from dn_detr.structures import Boxes, Instances
from tests.modeling.conftest import small_model_config

HEIGHT, WIDTH = 48, 64
HUGE_SIDE = 4000  # the first convolution alone gives 1 GiB
SMALL_CONFIG = Path(__file__).with_name("small_config.py")
# Overrides for runs that are compared to rounding: Adam makes much of the rounding of gradients
# that are almost zero.
PLAIN = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.05"]


class DrawnScenes(Dataset):
    """Noise with bright rectangles, none on every fourth image; no files are read.

    Args:
        length: number of images.
        nan_images: indices of images that hold NaN.
        huge_images: indices of images that are squares of `HUGE_SIDE` pixels.
    """

    def __init__(
        self,
        length: int = 16,
        nan_images: Sequence[int] = (),
        huge_images: Sequence[int] = (),
    ) -> None:
        self.image_ids = list(range(1, length + 1))
        self.class_names = ["class0", "class1"]
        self.category_ids = [1, 2]
        self.annotation_file = Path("drawn.json")
        self._nan_images = tuple(nan_images)
        self._huge_images = tuple(huge_images)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if index >= len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        height, width = HEIGHT - 8 * (index % 2), WIDTH
        if index in self._huge_images:
            height = width = HUGE_SIDE
        count = index % 4
        corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
        boxes_xyxy = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
        image = torch.randint(100, (3, height, width), generator=generator, dtype=torch.uint8)
        for x1, y1, x2, y2 in boxes_xyxy.long().tolist():
            image[:, y1 : y2 + 1, x1 : x2 + 1] += 80
        if index in self._nan_images:
            image = image.float()
            image[0, 0, 0] = torch.nan
        return {
            "image": image,
            "height": height,
            "width": width,
            "image_id": self.image_ids[index],
            "file_name": f"images/{index}.jpg",
            "seed": index + 7 * epoch,
            "instances": Instances(
                (height, width),
                gt_boxes=Boxes(boxes_xyxy),
                gt_classes=torch.randint(2, (count,), generator=generator),
            ),
        }

    def subset(self, length: int) -> DrawnScenes:
        return DrawnScenes(length, self._nan_images, self._huge_images)


def small_detector(name: str = "dn_deformable_detr_r50") -> Any:
    """The model node of a family, in `configs/models`, that takes some milliseconds a step."""
    if name == "dn_detr_swin_t":
        cfg = get_config("dn_detr_swin_t_50ep.py").model
        cfg.backbone.weights = None
    else:
        cfg = small_model_config(name)
        cfg.backbone.out_features = ["layer2"]
        cfg.neck.in_channels, cfg.neck.in_strides = [128], [8]
        cfg.neck.num_levels = min(2, cfg.neck.num_levels)
    cfg.num_classes, cfg.num_queries = 2, 10
    if "num_pos_feats" in cfg.position_embedding:
        cfg.position_embedding.num_pos_feats = 16
    cfg.transformer.embed_dim = 32
    for half, num_layers in ((cfg.transformer.encoder, 1), (cfg.transformer.decoder, 2)):
        half.num_layers = num_layers
        half.layer.update(num_heads=4, feedforward_dim=64)
    OmegaConf.resolve(cfg)  # it may be put anywhere then
    return cfg


def small_run(
    output_dir: Path, *overrides: str, name: str = "dn_deformable_detr_r50"
) -> DictConfig:
    """The config of `small_config.py` with the detector of another family."""
    cfg = LazyConfig.load(SMALL_CONFIG)
    cfg.model.model = small_detector(name)
    return LazyConfig.apply_overrides(cfg, [f"train.output_dir={output_dir}", *overrides])
