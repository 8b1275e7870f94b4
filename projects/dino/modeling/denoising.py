"""Contrastive denoising: a near box is to become its object, a far one is to predict nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dn_detr.modeling import QueryDenoising
from dn_detr.modeling.denoising import Noise
from dn_detr.structures import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh


class ContrastiveDenoising(QueryDenoising):
    """Every object is noised twice in a group, and the corners of its box move.

    A corner moves by up to `box_noise` half sides of the box for the positive, and by one to two
    times as much for the negative. As published, both keep the object's label, noised alike.
    It differs from the published code in what depends on which images share a batch: an image
    with n objects has `min(num_groups, max_queries // 2n)` groups, whatever the others have, and
    positives and negatives are told apart in batches of any size.

    Args:
        num_classes, embed: see `QueryDenoising`.
        num_groups: most groups of an image; the published models are bounded by `max_queries`
            alone.
        label_noise: see `QueryDenoising`. The published `dn_label_noise_ratio` 0.5 is halved
            where it is used.
        box_noise: see above.
        max_queries: see `QueryDenoising`; twice the published `dn_number`.
        unlabelled_negatives: negatives have the label "nothing", the last row of a table with
            `no_object_label=True`: the version of the DN-DETR repository.
        **options: see `QueryDenoising`.

    Source: Zhang et al., "DINO", 2022, section 3.3 (https://arxiv.org/abs/2203.03605).
    """

    num_negatives = 1

    def __init__(
        self,
        num_classes: int,
        embed: Any = None,
        *,
        num_groups: int = 100,
        label_noise: float = 0.25,
        box_noise: float = 1.0,
        max_queries: int = 200,
        unlabelled_negatives: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            embed,
            num_groups=num_groups,
            label_noise=label_noise,
            box_noise=box_noise,
            max_queries=max_queries,
            **options,
        )
        self.unlabelled_negatives = unlabelled_negatives

    def add_noise(
        self, labels: Tensor, boxes: Tensor, noise: Noise, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `QueryDenoising.add_noise`."""
        labels = torch.where(noise.flip < self.label_noise, noise.label, labels)
        if self.unlabelled_negatives:
            labels = labels.masked_fill(negative, self.num_classes)
        draw = noise.box.to(boxes) * 2 - 1
        shift = draw + torch.where(draw < 0, -1, 1) * negative[:, None]
        half_sides = boxes[:, 2:].repeat(1, 2) / 2
        corners = box_cxcywh_to_xyxy(boxes) + shift * half_sides * self.box_noise
        # Corners may pass each other: the side is 0 then.
        return labels, box_xyxy_to_cxcywh(corners.clamp(0, 1)).clamp(min=0)
