"""What a detector takes: samples, checked, and their images and ground truth as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dn_detr.errors import UserError, image_name
from dn_detr.structures import box_xyxy_to_cxcywh

from .pairs import Targets


def images_of(samples: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The images of samples, as they are.

    Args:
        samples: see `Detector.forward`.

    Returns:
        Per image (3, H, W) RGB in [0, 255].

    Raises:
        ValueError: no list of samples, an image that is not a (3, H, W) tensor or has no pixel, or
            one with values in [0, 1].
    """
    if isinstance(samples, (Tensor, Mapping)) or not all(
        isinstance(sample, Mapping) for sample in samples
    ):
        raise UserError('a detector takes a list of samples: [{"image": (3, H, W) tensor, ...}]')
    if not samples:
        raise UserError("the batch holds no sample")
    for sample in samples:
        image, name = sample["image"], _name(sample)
        if not isinstance(image, Tensor):
            raise UserError(f"{name}: image must be a tensor, is {type(image).__name__}")
        if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise UserError(f"{name}: image must be (3, H, W), is {tuple(image.shape)}")
        on_host = image.is_floating_point() and not image.is_cuda  # elsewhere it would wait
        if on_host and image.numel() and 0 < image.max() <= 1:
            raise UserError(f"{name}: image must hold [0, 255], not [0, 1]")
    return [sample["image"] for sample in samples]


def targets_of(
    samples: Sequence[dict[str, Any]],
    num_classes: int,
    device: torch.device,
    fields: Sequence[str] = (),
) -> Targets:
    """Labels and normalised boxes of each sample.

    Args:
        samples: see `Detector.forward`.
        num_classes: K; classes lie in [0, K).
        device: of the tensors.
        fields: further fields of the ground truth, such as `gt_masks`.

    Returns:
        Per image `labels` (n,) int64, `boxes` (n, 4) as (cx, cy, w, h) in [0, 1], and the
        `fields`, as they are and without `gt_`.

    Raises:
        ValueError: no `instances` or field, a class outside [0, num_classes), a box that is not
            finite or has its corners swapped, or not one class per box.
    """
    targets = []
    for sample in samples:
        truth, name = ground_truth_of(sample), _name(sample)
        boxes_xyxy = ground_truth_boxes(sample)
        labels = truth.gt_classes.long()
        # What would silently give a wrong loss.
        if len(boxes_xyxy) != len(labels):
            raise UserError(f"{name}: {len(boxes_xyxy)} boxes, {len(labels)} classes")
        sound = boxes_xyxy.isfinite().all(1) & (boxes_xyxy[:, 2:] >= boxes_xyxy[:, :2]).all(1)
        if not sound.all():
            raise UserError(
                f"{name}: boxes must be finite corners x1 <= x2, y1 <= y2, not "
                f"{boxes_xyxy[~sound].tolist()}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UserError(
                f"{name}: classes {sorted(set(labels.tolist()))} do not lie in "
                f"[0, {num_classes}); set model.num_classes"
            )
        height, width = sample["image"].shape[-2:]
        norm = box_xyxy_to_cxcywh(boxes_xyxy / boxes_xyxy.new_tensor([width, height] * 2))
        target = {"labels": labels.to(device), "boxes": norm.to(device)}
        for field in fields:
            if not truth.has(field):
                raise UserError(
                    f"{name}: the ground truth has no {field}, which model.target_fields names"
                )
            value = truth.get(field)
            value = torch.as_tensor(getattr(value, "tensor", value))
            target[field.removeprefix("gt_")] = value.to(device)
        targets.append(target)
    return targets


def ground_truth_boxes(sample: dict[str, Any]) -> Tensor:
    """Boxes (n, 4) XYXY of a sample's objects, in pixels of its image."""
    boxes = ground_truth_of(sample).gt_boxes
    return torch.as_tensor(getattr(boxes, "tensor", boxes)).reshape(-1, 4)


def original_size(sample: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of what detections are about: the original, or the image."""
    height, width = sample["image"].shape[-2:]
    return int(sample.get("height", height)), int(sample.get("width", width))


def ground_truth_of(sample: dict[str, Any]) -> Any:
    """Our `Instances` of a sample, or detectron2's.

    Raises:
        ValueError: there are none.
    """
    if "instances" not in sample:
        raise UserError(f"{_name(sample)}: training needs ground truth under 'instances'")
    return sample["instances"]


def _name(sample: dict[str, Any]) -> str:
    """What identifies a sample in a message."""
    return f"image {image_name(sample)}"
