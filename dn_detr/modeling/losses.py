"""The loss terms that matching queries and denoising queries share.

Legend: N decoder layers, M pairs of a query and a ground-truth box, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dn_detr.distributed import is_distributed, world_size
from dn_detr.structures import box_cxcywh_to_xyxy, generalized_box_iou

# Carion et al. 2020 and Zhu et al. 2021: weights of the classification, L1 and GIoU losses.
DEFAULT_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}


def complete_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """The factor of every loss term; None gives the published ones.

    Raises:
        ValueError: a term is missing, or unknown.
    """
    if weights is None:
        return dict(DEFAULT_WEIGHTS)
    if set(weights) != set(DEFAULT_WEIGHTS):
        raise ValueError(f"loss weights {sorted(weights)}: give {sorted(DEFAULT_WEIGHTS)}")
    return dict(weights)


def focal_loss(logits: Tensor, one_hot: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss of each layer, summed over everything else.

    Args:
        logits: (N, ..., K).
        one_hot: same shape, 1 where a query is to be that class.
        alpha: weight of the positive targets.
        gamma: focusing exponent.

    Returns:
        (N,) sums.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5.
    """
    losses = sigmoid_focal_loss(logits, one_hot, alpha=alpha, gamma=gamma)
    return losses.flatten(1).sum(1)


def box_losses(boxes: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """L1 and GIoU loss of each layer, summed over the pairs.

    Args:
        boxes: (N, M, 4) predicted (cx, cy, w, h) in [0, 1].
        targets: (M, 4) or (N, M, 4) ground truth in the same format.

    Returns:
        ``loss_bbox`` (N,) and ``loss_giou`` (N,).
    """
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets))
    l1 = F.l1_loss(boxes, targets.expand_as(boxes), reduction="none")
    return {"loss_bbox": l1.sum((1, 2)), "loss_giou": (1 - giou).sum(1)}


@dataclass(frozen=True)
class ObjectCounts:
    """How many boxes the losses of some images are about, or the divisors made of that.

    Counts of several batches add up, also with ``sum(counts, ObjectCounts())``.

    Attributes:
        matching: objects, which the matching queries are to find.
        denoising: noised boxes, which the denoising queries are to repair.
    """

    matching: float | Tensor = 0
    denoising: float | Tensor = 0

    def __add__(self, other: ObjectCounts) -> ObjectCounts:
        return ObjectCounts(self.matching + other.matching, self.denoising + other.denoising)


def mean_over_ranks(counts: ObjectCounts, device: torch.device) -> ObjectCounts:
    """The counts of all ranks, each at least 1, divided by the number of ranks.

    Gradients are averaged over ranks, so losses that every rank divides by these numbers are sums
    over all ranks divided by the whole count: a step does not depend on how images are spread.
    With several processes this is a collective call, a single all-reduce.

    Args:
        counts: of this rank, over all images of the step.
        device: where the process group communicates.

    Returns:
        Divisors: floats in a single process, else () float32 tensors on ``device``.
    """
    numbers = [float(counts.matching), float(counts.denoising)]
    if not is_distributed():
        return ObjectCounts(*(max(number, 1.0) for number in numbers))
    totals = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(totals)
    return ObjectCounts(*(totals.clamp(min=1) / world_size()).unbind())


def count_per_rank(count: int, device: torch.device) -> Tensor | float:
    """``mean_over_ranks`` of a single count, for losses that are used by themselves."""
    return mean_over_ranks(ObjectCounts(count), device).matching


def weigh_and_name(
    losses: Mapping[str, Tensor],
    weights: Mapping[str, float],
    count: Tensor | float,
    *,
    suffix: str = "",
) -> dict[str, Tensor]:
    """Divide, weigh and name the losses of all layers.

    Args:
        losses: (N,) sums per term.
        weights: factor of each term.
        count: divisor, see ``mean_over_ranks``.
        suffix: appended to the term's name.

    Returns:
        Scalars ``<term><suffix>`` for the last layer and ``<term><suffix>_<i>`` for layer i
        before it.
    """
    named = {}
    for term, per_layer in losses.items():
        *early, last = (weights[term] * per_layer / count).unbind()
        named[term + suffix] = last
        named |= {f"{term}{suffix}_{i}": value for i, value in enumerate(early)}
    return named
