"""Bipartite matching of predictions and ground truth.

Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1, with the focal
class cost of Zhu et al., "Deformable DETR", 2021.
Legend: N decoder layers, B batch, Q queries, K classes, T most objects of an image, M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dn_detr.structures import box_cxcywh_to_xyxy, pairwise_generalized_box_iou

Targets = list[dict[str, Tensor]]
"""Per image ``labels`` (n,) int64 and ``boxes`` (n, 4) float32 as (cx, cy, w, h) in [0, 1]."""


@dataclass(frozen=True)
class Matching:
    """Which query is to predict which object, for every layer; M pairs, image after image.

    Attributes:
        image: (M,) int64, index in [0, B); the same for all layers.
        query: (N, M) int64, index in [0, Q), ascending within an image.
        target: (N, M) int64, index into the objects of all images, concatenated.
        found_by: for each image (n,) int64 on the CPU, the query that is to predict each of its n
            objects in the last layer, in the order of the targets; -1 for an object without one.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    found_by: tuple[Tensor, ...]


class HungarianMatcher(nn.Module):
    """The assignment of least cost, for all layers and images at once.

    Args:
        cost_class: weight of the focal class cost.
        cost_bbox: weight of the L1 distance of (cx, cy, w, h).
        cost_giou: weight of the negative generalised IoU.
        alpha: focal weight of a positive.
        gamma: focal exponent.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Cost of every query for every object of its own image.

        Args:
            logits: (N, B, Q, K).
            boxes: (N, B, Q, 4) as (cx, cy, w, h) in [0, 1].
            targets: of B images.

        Returns:
            (N, B, Q, T); columns beyond an image's own objects are meaningless.
        """
        labels_BT = pad_sequence([t["labels"] for t in targets], batch_first=True)
        boxes_BT4 = pad_sequence([t["boxes"] for t in targets], batch_first=True).to(boxes)
        shape = (*logits.shape[:3], labels_BT.shape[1])
        p = logits.gather(-1, labels_BT[None, :, None].expand(shape)).sigmoid()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        distance = torch.cdist(boxes, boxes_BT4.expand(len(boxes), -1, -1, -1), p=1)
        giou = pairwise_generalized_box_iou(
            box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(boxes_BT4)[None]
        )
        return (
            self.cost_bbox * distance
            + self.cost_class * (positive - negative)
            - self.cost_giou * giou
        )

    def forward(
        self, logits: Tensor, boxes: Tensor, targets: Targets, ignored: Tensor | None = None
    ) -> Matching:
        """Match.

        An image with more objects than queries keeps Q pairs. Predictions that are not finite
        match arbitrarily; the loss then is not finite either, which the training loop reports.

        Args:
            logits: (N, B, Q, K).
            boxes: (N, B, Q, 4) as (cx, cy, w, h) in [0, 1].
            targets: of B images.
            ignored: (B, Q) bool, True = a query that is matched only where no other is left.
        """
        cost = self.cost(logits, boxes, targets)
        if ignored is not None:
            cost = cost.masked_fill(ignored[:, :, None], torch.inf)
        # One copy to the host for all layers and images; everything after it is on the CPU.
        cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu()
        images: list[Tensor] = []
        queries: list[list[Tensor]] = [[] for _ in cost]
        matched: list[list[Tensor]] = [[] for _ in cost]
        found_by: list[Tensor] = []
        offset = 0
        for image, target in enumerate(targets):
            count = len(target["labels"])
            for layer, cost_QT in enumerate(cost[:, image, :, :count]):
                rows, columns = (torch.as_tensor(x) for x in linear_sum_assignment(cost_QT))
                queries[layer].append(rows)
                matched[layer].append(columns + offset)
            images.append(torch.full_like(rows, image))
            found_by.append(torch.full((count,), -1).index_copy(0, columns, rows))
            offset += count
        pairs = torch.stack(
            [torch.cat(images)] + [torch.cat(x) for x in queries] + [torch.cat(x) for x in matched]
        ).to(logits.device)
        image_M, query_NM, target_NM = pairs.split([1, len(cost), len(cost)])
        return Matching(image_M[0], query_NM, target_NM, tuple(found_by))
