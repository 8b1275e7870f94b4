"""From raw predictions to instances in the original image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dn_detr.structures import Boxes, Instances, box_cxcywh_to_xyxy

from .classification import Classification, FocalClassification


class PostProcess(nn.Module):
    """Keep the detections with the best scores; no NMS, no threshold, no clipping.

    Args:
        num_select: how many to keep per image. DN-Deformable-DETR was published with 100.
        classification: what the logits mean, and whether a query may be kept with several classes.

    Raises:
        ValueError: `num_select` below 1.
    """

    def __init__(self, num_select: int = 100, classification: Classification | None = None) -> None:
        super().__init__()
        if num_select < 1:
            raise ValueError(f"num_select {num_select} must be at least 1")
        self.num_select = num_select
        self.classification = classification or FocalClassification()

    def forward(
        self, outputs: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Select and scale.

        Args:
            outputs: of the last layer: `pred_logits` (B, Q, L) and `pred_boxes` (B, Q, 4) as
                (cx, cy, w, h) in [0, 1].
            image_sizes: (height, width) of each original image in pixels.

        Returns:
            B instances by falling `scores` in [0, 1], with `pred_boxes` in pixels of the original
            image and `pred_classes` in [0, K).
        """
        boxes = outputs["pred_boxes"]
        scores, query, classes = self.classification.select(outputs["pred_logits"], self.num_select)
        heights_widths = torch.tensor(image_sizes, dtype=boxes.dtype, device=boxes.device)
        scale = heights_widths[:, [1, 0, 1, 0]][:, None]
        chosen = query[..., None].expand(-1, -1, 4)
        pixels = box_cxcywh_to_xyxy(boxes).gather(1, chosen) * scale
        return [
            Instances(size, pred_boxes=Boxes(b), scores=s, pred_classes=c)
            for size, b, s, c in zip(image_sizes, pixels, scores, classes, strict=True)
        ]
