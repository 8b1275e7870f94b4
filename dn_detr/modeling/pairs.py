"""Pairs of a query and the object that it is trained to predict: what every loss is computed from.

The matcher finds them for the matching queries and for the encoder's proposals; for the denoising
queries they are known in advance.
Legend: N decoder layers, B batch, Q queries, M pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dn_detr.errors import UserError

Outputs = dict[str, Tensor]
"""`pred_logits` (N, B, Q, L), `pred_boxes` (N, B, Q, 4) as (cx, cy, w, h) in [0, 1], and what else
the heads predict, each (N, B, Q, ...)."""

Targets = list[dict[str, Tensor]]
"""Per image `labels` (n,) int64, `boxes` (n, 4) float32 as (cx, cy, w, h) in [0, 1], and what else
the data set knows of its n objects, each (n, ...)."""


@dataclass(frozen=True)
class Pairs:
    """Which query is trained to predict which object, for every layer; M pairs, image after image.

    Attributes:
        image: (M,) int64, index in [0, B); the same for all layers.
        query: (N, M) or, the same for all layers, (1, M) int64, index in [0, Q).
        target: (N, M) or (1, M) int64, index into the objects of all images, concatenated.
        classified: image (C,) and query (C,) int64 of the queries that take part in the
            classification; without a pair they are to predict nothing. None: all queries.
        query_of_object: for each image (n,) int64 on the CPU, the query matched to each of its n
            objects in the last layer; -1 for an object without one. Empty if nothing was matched.
        total_weight: of the classified queries of the whole step, see `Classification.loss`.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    classified: tuple[Tensor, Tensor] | None = None
    query_of_object: tuple[Tensor, ...] = ()
    total_weight: Tensor | float | None = None

    def __len__(self) -> int:
        """M."""
        return len(self.image)

    def index(self, num_layers: int) -> tuple[Tensor, Tensor, Tensor]:
        """Layer, image and query of each pair, which broadcast to (N, M)."""
        layer = torch.arange(num_layers, device=self.image.device)[:, None]
        return layer, self.image, self.query

    def predictions(self, output: Tensor) -> Tensor:
        """What the paired queries predict: (N, B, Q, ...) -> (N, M, ...)."""
        return output[self.index(len(output))]

    def objects(self, targets: Targets, name: str) -> Tensor:
        """What the paired queries are to predict: field `name` of their objects.

        Returns:
            (N, M, ...) or, the same for all layers, (1, M, ...).

        Raises:
            UserError: the targets have no such field.
        """
        if lacking := [target for target in targets if name not in target]:
            raise UserError(
                f"the targets have {', '.join(sorted(lacking[0]))}, not {name!r}; what a data set "
                "knows besides is named in model.target_fields, with gt_ before it"
            )
        return torch.cat([target[name] for target in targets])[self.target]


class Term(nn.Module):
    """What terms of the loss and terms of a matching's cost have in common.

    Args:
        weight: factor of the term.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight


def term_dict(terms: Mapping[str, Term]) -> nn.ModuleDict:
    """Terms by name, as a module.

    Raises:
        UserError: a term was not initialised, or its weight is no number of at least 0.
    """
    for name, term in terms.items():
        if "_modules" not in vars(term):
            raise UserError(f"{name}: {type(term).__name__}.__init__ must call super().__init__()")
        weight = getattr(term, "weight", 1.0)
        if not isinstance(weight, (int, float, Tensor)) or not 0 <= weight < math.inf:
            raise UserError(f"{name}.weight must be a number of at least 0, not {weight!r}")
    return nn.ModuleDict(terms)


def pad_targets(targets: Targets, name: str) -> Tensor:
    """Field `name` of the objects of each image, (B, T, ...) with zeros after its own objects."""
    return pad_sequence([target[name] for target in targets], batch_first=True)


def shape_of(value: object) -> str:
    """What a term returned, for a message about it."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
