"""Bipartite matching of predictions and ground truth.

Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1, with the focal
class cost of Zhu et al., "Deformable DETR", 2021. A further cost is a subclass of `MatchingCost`
and a line in the config, see `HungarianMatcher`.
Legend: N decoder layers, B batch, Q queries, T most objects of an image, M pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dn_detr.errors import UserError
from dn_detr.structures import box_cxcywh_to_xyxy, pairwise_generalized_box_iou

from .classification import Classification, FocalClassification
from .pairs import Outputs, Pairs, Targets, Term, pad_targets, shape_of, term_dict

_LARGEST_COST = 1e6  # of what is matched only where nothing else is left


class MatchingCost(Term, ABC):
    """One term of the cost of a query for an object."""

    @abstractmethod
    def forward(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Cost of every query for every object of its own image, before the weight.

        Args:
            outputs: see `Outputs`; (N, B, Q, ...) each.
            targets: of B images; `pad_targets` makes one tensor of a field.

        Returns:
            (N, B, Q, T); columns beyond an image's own objects are meaningless.
        """


class ClassificationCost(MatchingCost):
    """What the classification takes for its cost.

    Args:
        classification: gives the cost of logits.
        weight: factor of the term.
    """

    def __init__(self, classification: Classification, *, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.classification = classification

    def forward(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See `MatchingCost.forward`."""
        return self.classification.cost(outputs["pred_logits"], pad_targets(targets, "labels"))


class BoxL1Cost(MatchingCost):
    """Distance of (cx, cy, w, h) in the unit square."""

    def forward(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See `MatchingCost.forward`."""
        boxes = outputs["pred_boxes"]
        expected_BT4 = pad_targets(targets, "boxes").to(boxes)
        return torch.cdist(boxes, expected_BT4.expand(len(boxes), -1, -1, -1), p=1)


class BoxGIoUCost(MatchingCost):
    """The negative generalised IoU, in [-1, 1]."""

    def forward(self, outputs: Outputs, targets: Targets) -> Tensor:
        """See `MatchingCost.forward`."""
        boxes = outputs["pred_boxes"]
        expected_BT4 = pad_targets(targets, "boxes").to(boxes)
        return -pairwise_generalized_box_iou(
            box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(expected_BT4)[None]
        )


class HungarianMatcher(nn.Module):
    """The assignment of least cost, for all layers and images together.

    Args:
        costs: name -> term; by default those of Deformable DETR with their published weights.
    """

    def __init__(self, costs: Mapping[str, MatchingCost] | None = None) -> None:
        super().__init__()
        if costs is None:
            costs = {
                "cost_class": ClassificationCost(FocalClassification(), weight=2.0),
                "cost_bbox": BoxL1Cost(weight=5.0),
                "cost_giou": BoxGIoUCost(weight=2.0),
            }
        self.costs = term_dict(costs)

    def cost(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Cost of every query for every object of its own image, see `MatchingCost.forward`.

        Raises:
            UserError: a cost has another shape.
        """
        first, *others = self._weighted(outputs, targets).values()
        return sum(others, first)

    @torch.no_grad()
    def _weighted(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        most = max((len(target["labels"]) for target in targets), default=0)
        shape = (*next(iter(outputs.values())).shape[:3], most)
        costs: dict[str, Tensor] = {}
        term: Any
        for name, term in self.costs.items():
            value = term(outputs, targets)
            if not isinstance(value, Tensor) or value.shape != shape:
                raise UserError(
                    f"model.criterion.matcher.costs.{name}: {type(term).__name__} must return a "
                    f"tensor (layers, images, queries, objects) = {shape}, not {shape_of(value)}"
                )
            costs[name] = term.weight * value
        return costs

    def forward(self, outputs: Outputs, targets: Targets, ignored: Tensor | None = None) -> Pairs:
        """Match.

        An image with more objects than queries keeps Q pairs. Predictions that are not finite
        match arbitrarily; the loss then is not finite either, which the training loop reports.
        (Costs that are not finite though the predictions are would go unnoticed: an error.)

        Args:
            outputs: see `Outputs`; (N, B, Q, ...) each.
            targets: of B images.
            ignored: (B, Q) bool, True = a query that is matched only where no other is left, and
                does not take part in the classification.

        Raises:
            UserError: a cost has another shape, or is not finite for finite predictions.
        """
        cost = self.cost(outputs, targets)
        device = cost.device
        if ignored is not None:
            cost = cost.masked_fill(ignored[:, :, None], _LARGEST_COST)
        # One copy to the host for all layers and images; everything after it is on the CPU.
        cost = cost.cpu()
        if not cost.isfinite().all():
            self._check_finite(outputs, targets)
            cost = cost.nan_to_num(_LARGEST_COST, _LARGEST_COST, -_LARGEST_COST)
        images: list[Tensor] = []
        queries: list[list[Tensor]] = [[] for _ in cost]
        matched: list[list[Tensor]] = [[] for _ in cost]
        query_of_object: list[Tensor] = []
        offset = 0
        for image, target in enumerate(targets):
            count = len(target["labels"])
            for layer, cost_QT in enumerate(cost[:, image, :, :count]):
                rows, columns = (torch.as_tensor(x) for x in linear_sum_assignment(cost_QT))
                queries[layer].append(rows)
                matched[layer].append(columns + offset)
            images.append(torch.full_like(rows, image))
            query_of_object.append(torch.full((count,), -1).index_copy(0, columns, rows))
            offset += count
        pairs = torch.stack(
            [torch.cat(images)] + [torch.cat(x) for x in queries] + [torch.cat(x) for x in matched]
        ).to(device)
        image_M, query_NM, target_NM = pairs.split([1, len(cost), len(cost)])
        classified = None
        if ignored is not None:
            image_C, query_C = (~ignored).nonzero(as_tuple=True)
            classified = image_C, query_C
        return Pairs(image_M[0], query_NM, target_NM, classified, tuple(query_of_object))

    def _check_finite(self, outputs: Outputs, targets: Targets) -> None:
        """Name a cost that is not finite, unless the predictions are not."""
        if not all(output.isfinite().all() for output in outputs.values()):
            return
        for name, value in self._weighted(outputs, targets).items():
            own = [value[:, i, :, : len(target["labels"])] for i, target in enumerate(targets)]
            if not all(costs.isfinite().all() for costs in own):
                raise UserError(
                    f"model.criterion.matcher.costs.{name}: {type(self.costs[name]).__name__} "
                    "gives costs of finite predictions that are not finite"
                )
