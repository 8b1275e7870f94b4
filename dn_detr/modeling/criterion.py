"""The set-prediction loss of the matching queries.

Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1 and appendix A.2,
with the focal loss of Zhu et al., "Deformable DETR", 2021.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .losses import box_losses, complete_weights, count_per_rank, focal_loss, weigh_and_name
from .matcher import HungarianMatcher, Matching, Targets

_CERTAINLY_NOTHING = -100.0  # a logit without loss or gradient


class DetectionCriterion(nn.Module):
    """Match every decoder layer's predictions, then compare classes and boxes.

    Args:
        matcher: assigns queries to objects.
        weights: factors of ``loss_ce`` (focal), ``loss_bbox`` (L1) and ``loss_giou``.
        alpha: focal weight of a positive.
        gamma: focal exponent.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        *,
        weights: Mapping[str, float] | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.weights = complete_weights(weights)
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        *,
        count: Tensor | float | None = None,
        matching: Matching | None = None,
        suffix: str = "",
        ignored: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of all layers.

        Without any object the box losses are zeros that still belong to the graph.

        Args:
            logits: (N, B, Q, K) float32.
            boxes: (N, B, Q, 4) float32 as (cx, cy, w, h) in [0, 1].
            targets: of B images.
            count: what every term is divided by, see ``mean_over_ranks``; by default the number of
                objects per rank (over all ranks, at least one).
            matching: by default what the matcher finds.
            suffix: appended to the names of the losses.
            ignored: (B, Q) bool, True = a query that is neither matched nor trained.

        Returns:
            Scalars ``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last layer, and the same with
            suffix ``_i`` of each layer i before it.
        """
        if matching is None:
            matching = self.matcher(logits, boxes, targets, ignored)
        if ignored is not None:
            logits = logits.masked_fill(ignored[..., None], _CERTAINLY_NOTHING)
        labels = torch.cat([t["labels"] for t in targets])
        target_boxes = torch.cat([t["boxes"] for t in targets])
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        matched = (layer, matching.image, matching.query)  # each broadcasts to (N, M)
        one_hot = torch.zeros_like(logits)
        one_hot[(*matched, labels[matching.target])] = 1.0
        losses = {
            "loss_ce": focal_loss(logits, one_hot, alpha=self.alpha, gamma=self.gamma),
            **box_losses(boxes[matched], target_boxes[matching.target]),
        }
        if count is None:
            count = count_per_rank(len(labels), logits.device)
        return weigh_and_name(losses, self.weights, count, suffix=suffix)
