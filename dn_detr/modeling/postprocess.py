"""From raw predictions to instances in the original image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dn_detr.structures import Boxes, Instances, box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Keep the best-scoring pairs of a query and a class; no NMS, no threshold, no clipping.

    Args:
        num_select: how many to keep per image. DN-Deformable-DETR was published with 100.
    """

    def __init__(self, num_select: int = 100) -> None:
        super().__init__()
        self.num_select = num_select

    def forward(
        self, logits: Tensor, boxes: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Select and scale.

        Args:
            logits: (B, Q, K).
            boxes: (B, Q, 4) as (cx, cy, w, h) in [0, 1].
            image_sizes: (height, width) of each original image in pixels.

        Returns:
            B instances by falling ``scores`` in [0, 1], with ``pred_boxes`` in pixels of the
            original image and ``pred_classes`` in [0, K). A query may appear with several classes.
        """
        num_classes = logits.shape[-1]
        probabilities = logits.sigmoid().flatten(1)
        scores, chosen = probabilities.topk(min(self.num_select, probabilities.shape[1]))
        query = (chosen // num_classes)[..., None].expand(-1, -1, 4)
        heights_widths = torch.tensor(image_sizes, dtype=boxes.dtype, device=boxes.device)
        scale = heights_widths[:, [1, 0, 1, 0]][:, None]
        pixels = box_cxcywh_to_xyxy(boxes).gather(1, query) * scale
        return [
            Instances(size, pred_boxes=Boxes(b), scores=s, pred_classes=c)
            for size, b, s, c in zip(image_sizes, pixels, scores, chosen % num_classes, strict=True)
        ]
