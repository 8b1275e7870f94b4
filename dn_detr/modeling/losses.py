"""The terms of the loss: each is computed from pairs of a query and an object.

A further term is a subclass of `LossTerm` and a line in the config, see `DetectionCriterion`.
Legend: N decoder layers, M pairs, L logits of a query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.errors import UserError
from dn_detr.structures import box_cxcywh_to_xyxy, generalized_box_iou

from .classification import NOTHING, Classification
from .pairs import Outputs, Pairs, Targets, Term


class LossTerm(Term):
    """One term of the loss, of all layers.

    A subclass says what is summed; or, with a normaliser of its own, overrides `forward`.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        if type(self).sums is LossTerm.sums and type(self).forward is LossTerm.forward:
            raise UserError(f"{type(self).__name__} must define sums, or forward")

    def forward(
        self, outputs: Outputs, targets: Targets, pairs: Pairs, count: Tensor | float
    ) -> Tensor:
        """The weighted term of each layer, (N,).

        Args:
            outputs: see `Outputs`; (N, B, Q, ...) each.
            targets: of B images.
            pairs: of their queries and objects.
            count: number of pairs by which the sums are divided, see `mean_over_ranks`.
        """
        return self.weight * self.sums(outputs, targets, pairs) / count

    def sums(self, outputs: Outputs, targets: Targets, pairs: Pairs) -> Tensor:
        """The term of each layer, summed over the pairs, (N,)."""
        raise NotImplementedError


class ClassificationLoss(LossTerm):
    """Classes of the paired queries, and nothing for the others that are classified.

    Args:
        classification: gives the loss of logits.
        weight: factor of the term.
    """

    def __init__(self, classification: Classification, *, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.classification = classification

    def forward(
        self, outputs: Outputs, targets: Targets, pairs: Pairs, count: Tensor | float
    ) -> Tensor:
        """See `LossTerm.forward`."""
        logits = outputs["pred_logits"]
        labels = torch.full(logits.shape[:3], NOTHING, device=logits.device)
        labels[pairs.index(len(logits))] = pairs.objects(targets, "labels")
        if pairs.classified is not None:
            image, query = pairs.classified
            logits, labels = logits[:, image, query], labels[:, image, query]
        loss = self.classification.loss(logits, labels, count, pairs.total_weight)
        return self.weight * loss


class BoxL1Loss(LossTerm):
    """Distance of (cx, cy, w, h) in the unit square."""

    def sums(self, outputs: Outputs, targets: Targets, pairs: Pairs) -> Tensor:
        """See `LossTerm.sums`."""
        boxes = pairs.predictions(outputs["pred_boxes"])
        expected = pairs.objects(targets, "boxes").expand_as(boxes)
        return F.l1_loss(boxes, expected, reduction="none").sum((1, 2))


class BoxGIoULoss(LossTerm):
    """1 minus the generalised IoU, in [0, 2] for each pair."""

    def sums(self, outputs: Outputs, targets: Targets, pairs: Pairs) -> Tensor:
        """See `LossTerm.sums`."""
        boxes_xyxy = box_cxcywh_to_xyxy(pairs.predictions(outputs["pred_boxes"]))
        expected_xyxy = box_cxcywh_to_xyxy(pairs.objects(targets, "boxes"))
        return (1 - generalized_box_iou(boxes_xyxy, expected_xyxy)).sum(1)
