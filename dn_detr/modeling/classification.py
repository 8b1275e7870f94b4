"""From class logits to costs, losses and detections: focal, or softmax with a class "nothing".

An object of these classes is stateless, so parts that share one may as well have equal copies.
Legend: N decoder layers, B batch, Q queries, K classes, L logits of a query, T most objects of an
image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

NOTHING = -1
"""Label of a query that is to predict nothing."""

Number = Tensor | float
"""A number that may come from the device, as a scalar."""


class Classification(ABC):
    """What logits mean: the one place that matcher, criterion, heads and post-processing ask."""

    @abstractmethod
    def num_logits(self, num_classes: int) -> int:
        """L, the number of logits for K classes; the first K are theirs."""

    def class_head(self, embed_dim: int, num_classes: int) -> nn.Linear:
        """Linear layer (..., C) -> (..., L) as it starts its training."""
        return nn.Linear(embed_dim, self.num_logits(num_classes))

    @abstractmethod
    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of every query for every object.

        Args:
            logits: (N, B, Q, L).
            labels: (B, T) int64 in [0, K).

        Returns:
            (N, B, Q, T).
        """

    @abstractmethod
    def loss(
        self, logits: Tensor, labels: Tensor, count: Number, total_weight: Number | None = None
    ) -> Tensor:
        """Loss of each layer.

        Args:
            logits: (N, ..., L).
            labels: (N, ...) int64 in [0, K), or `NOTHING`.
            count: number of pairs, see `mean_over_ranks`.
            total_weight: see below, over the whole step and the mean over ranks; None: that of
                these queries.

        Returns:
            (N,).
        """

    def total_weight(self, num_pairs: Number, num_queries: Number) -> Number:
        """What a weighted mean over queries is divided by, where the loss is one; else 0.

        Args:
            num_pairs: queries that are to predict an object.
            num_queries: all queries that are classified.
        """
        return 0.0

    @abstractmethod
    def select(self, logits: Tensor, num_select: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best detections of each image, best first.

        Args:
            logits: (B, Q, L).
            num_select: the most to keep.

        Returns:
            score in [0, 1], query in [0, Q) and class in [0, K), each (B, S).
        """


def _broadcast_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """(B, T) -> (N, B, Q, T), indices into the last dimension of (N, B, Q, L) logits."""
    return labels[None, :, None].expand(*logits.shape[:3], -1)


@dataclass(frozen=True)
class FocalClassification(Classification):
    """A sigmoid for every class, trained with the focal loss; nothing is all classes near 0.

    Args:
        alpha: weight of a positive; 1 - alpha is that of a negative.
        gamma: focusing exponent.
        prior: score of every class at the start (section 3.3).

    Raises:
        ValueError: alpha outside [0, 1], gamma below 0, prior outside (0, 1), or not finite.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5; as the cost of a
    matching: Zhu et al., "Deformable DETR", 2021.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    prior: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must lie in [0, 1]")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma {self.gamma} must lie in [0, inf)")
        if not 0 < self.prior < 1:
            raise ValueError(f"prior {self.prior} must lie in (0, 1)")

    def num_logits(self, num_classes: int) -> int:
        """See `Classification.num_logits`: K."""
        return num_classes

    def class_head(self, embed_dim: int, num_classes: int) -> nn.Linear:
        """See `Classification.class_head`; starts from the prior."""
        head = super().class_head(embed_dim, num_classes)
        nn.init.constant_(head.bias, -math.log((1 - self.prior) / self.prior))
        return head

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Classification.cost`: loss as a positive minus loss as a negative."""
        p = logits.gather(-1, _broadcast_labels(labels, logits)).sigmoid()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        return positive - negative

    def loss(
        self, logits: Tensor, labels: Tensor, count: Number, total_weight: Number | None = None
    ) -> Tensor:
        """See `Classification.loss`: the sum over queries and classes, divided by `count`."""
        classes = torch.arange(logits.shape[-1], device=logits.device)
        one_hot = (labels[..., None] == classes).to(logits.dtype)
        losses = sigmoid_focal_loss(logits, one_hot, alpha=self.alpha, gamma=self.gamma)
        return losses.flatten(1).sum(1) / count

    def select(self, logits: Tensor, num_select: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Classification.select`; a query may be selected with several classes."""
        num_classes = logits.shape[-1]
        scores = logits.sigmoid().flatten(1)
        score, chosen = scores.topk(min(num_select, scores.shape[1]))
        return score, chosen // num_classes, chosen % num_classes


@dataclass(frozen=True)
class SoftmaxClassification(Classification):
    """A softmax over the classes and, last, "nothing", trained with the cross-entropy.

    Args:
        no_object_weight: weight of the queries that are to predict nothing, which are many.

    Raises:
        ValueError: `no_object_weight` is negative or not finite.

    Source: Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1.
    """

    no_object_weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.no_object_weight < math.inf:
            raise ValueError(f"no_object_weight {self.no_object_weight} must lie in [0, inf)")

    def num_logits(self, num_classes: int) -> int:
        """See `Classification.num_logits`: K + 1."""
        return num_classes + 1

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Classification.cost`: minus the probability of the class."""
        return -logits.softmax(-1).gather(-1, _broadcast_labels(labels, logits))

    def total_weight(self, num_pairs: Number, num_queries: Number) -> Number:
        """See `Classification.total_weight`."""
        return num_pairs + self.no_object_weight * (num_queries - num_pairs)

    def loss(
        self, logits: Tensor, labels: Tensor, count: Number, total_weight: Number | None = None
    ) -> Tensor:
        """See `Classification.loss`: the weighted mean over the queries; 0 without any.

        DETR's code takes the mean of each rank, and the mean of these.
        """
        labels = torch.where(labels == NOTHING, logits.shape[-1] - 1, labels)
        weights = logits.new_ones(logits.shape[-1])
        weights[-1] = self.no_object_weight
        losses = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), weight=weights, reduction="none"
        )
        if total_weight is None:
            total_weight = weights[labels].flatten(1).sum(1).clamp(min=1e-8)
        return losses.view_as(labels).flatten(1).sum(1) / total_weight

    def select(self, logits: Tensor, num_select: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Classification.select`; a query is selected with its likeliest class alone."""
        scores, classes = logits.softmax(-1)[..., :-1].max(-1)
        score, query = scores.topk(min(num_select, scores.shape[1]))
        return score, query, classes.gather(1, query)
