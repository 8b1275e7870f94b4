"""The set-prediction loss: a sum of terms over pairs of a query and an object.

Carion et al., "End-to-End Object Detection with Transformers", 2020, section 3.1 and appendix A.2.
One criterion serves the matching queries, the denoising queries and the encoder's proposals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dn_detr.distributed import is_distributed, world_size
from dn_detr.errors import UserError

from .classification import FocalClassification
from .losses import BoxGIoULoss, BoxL1Loss, ClassificationLoss, LossTerm
from .matcher import HungarianMatcher
from .pairs import Outputs, Pairs, Targets, shape_of, term_dict


class DetectionCriterion(nn.Module):
    """Weighted losses of given pairs, layer by layer.

    Args:
        losses: name -> term; by default those of Deformable DETR with their published weights.
        matcher: finds the pairs of the matching queries and of the encoder's proposals, for the
            detector that asks it; by default Deformable DETR's.
    """

    def __init__(
        self,
        losses: Mapping[str, LossTerm] | None = None,
        matcher: HungarianMatcher | None = None,
    ) -> None:
        super().__init__()
        if losses is None:
            losses = {
                "loss_ce": ClassificationLoss(FocalClassification()),
                "loss_bbox": BoxL1Loss(weight=5.0),
                "loss_giou": BoxGIoULoss(weight=2.0),
            }
        self.losses = term_dict(losses)
        self.matcher = matcher or HungarianMatcher()

    def forward(
        self,
        outputs: Outputs,
        targets: Targets,
        pairs: Pairs,
        *,
        count: Tensor | float,
        suffix: str = "",
    ) -> dict[str, Tensor]:
        """Weighted losses of all layers.

        Without any pair the terms of the pairs are zeros that still belong to the graph.

        Args:
            outputs: see `Outputs`; (N, B, Q, ...) each.
            targets: of B images.
            pairs: which query is to predict which object.
            count: number of pairs by which the sums are divided, see `mean_over_ranks`.
            suffix: appended to the names of the terms.

        Returns:
            Scalars `<term><suffix>` of the last layer and `<term><suffix>_<i>` of each layer i
            before it.

        Raises:
            UserError: a term returns something else than (N,) numbers.
        """
        losses = {}
        num_layers = len(next(iter(outputs.values())))
        for name, term in self.losses.items():
            values = term(outputs, targets, pairs, count)
            if not isinstance(values, Tensor) or values.shape != (num_layers,):
                raise UserError(
                    f"model.criterion.losses.{name}: {type(term).__name__} must return one number "
                    f"for each decoder layer, a tensor ({num_layers},), not {shape_of(values)}"
                )
            *early, last = values.unbind()
            losses[name + suffix] = last
            losses |= {f"{name}{suffix}_{i}": value for i, value in enumerate(early)}
        return losses


@dataclass(frozen=True)
class ObjectCounts:
    """Normalisers of the matching and the denoising losses, or the counts that they come from.

    Counts of several batches add up, also with `sum(counts, ObjectCounts())`.

    Attributes:
        matching: number of objects.
        denoising: number of noised boxes.
        weights: sum of the weights of the matching queries, or of as many proposals, see
            `Classification.total_weight`.
    """

    matching: float | Tensor = 0
    denoising: float | Tensor = 0
    weights: float | Tensor = 0

    def __add__(self, other: ObjectCounts) -> ObjectCounts:
        return ObjectCounts(
            self.matching + other.matching,
            self.denoising + other.denoising,
            self.weights + other.weights,
        )


def mean_over_ranks(counts: ObjectCounts, device: torch.device) -> ObjectCounts:
    """The numbers of all ranks, counts at least 1, divided by the number of ranks.

    Gradients are averaged over ranks, so losses that every rank divides by these numbers are sums
    over all ranks divided by the whole count: a step does not depend on how images are spread.
    With several processes this is a collective call, a single all-reduce.

    Args:
        counts: of this rank, over all images of the step.
        device: where the process group communicates.

    Returns:
        Divisors: floats in a single process, else () float32 tensors on `device`.
    """
    numbers = [float(counts.matching), float(counts.denoising), float(counts.weights)]
    if not is_distributed():
        return ObjectCounts(max(numbers[0], 1.0), max(numbers[1], 1.0), numbers[2])
    totals = torch.tensor(numbers, device=device)
    dist.all_reduce(totals)
    totals[:2].clamp_(min=1)
    return ObjectCounts(*(totals / world_size()).unbind())
