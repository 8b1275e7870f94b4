"""The detector: parts composed by a config, called with detectron2's protocol.

images -> backbone -> neck -> encoder -> memory -> decoder -> heads -> criterion or post-processing
                                           |         ^
                                        queries + noised ground truth (training)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dn_detr.checkpoint import Layout, as_layouts
from dn_detr.errors import UserError
from dn_detr.structures import Instances, pad_images

from .classification import Classification, FocalClassification
from .criterion import DetectionCriterion, ObjectCounts, mean_over_ranks
from .denoising import NoisedQueries, QueryDenoising
from .heads import DetectionHeads
from .inputs import ground_truth_of, images_of, original_size, targets_of
from .pairs import Outputs, Pairs, Targets, shape_of
from .postprocess import PostProcess
from .queries import ProposalQueries, Queries
from .transformers import Memory, Transformer


class Diagnostics(NamedTuple):
    """How a training step went, apart from its losses.

    Attributes:
        queries: of each image the query that each object was matched with in the last decoder
            layer, see `Pairs.query_of_object`.
        denoising_correct: () int64 on the model's device, noised boxes whose most likely class
            after the last layer is the true one; 0 without denoising.
        denoising_total: noised boxes; 0 without denoising.
    """

    queries: tuple[Tensor, ...]
    denoising_correct: Tensor
    denoising_total: int


class Detector(nn.Module):
    """A DETR-like detector. DN-DETR with `denoising=None` is DAB-DETR.

    Args:
        backbone: (images, mask) -> feature maps.
        neck: (feature maps, mask) -> maps of one width, and their masks.
        position_embedding: mask of a map -> its position embedding.
        queries: memory -> content and position of the matching queries.
        transformer: maps -> memory, and queries -> states and references of every decoder layer.
        heads: states, references and memory -> outputs of every decoder layer, see `Outputs`.
        criterion: losses of pairs of a query and an object, and the matcher that finds pairs.
        postprocess: outputs -> instances.
        denoising: ground truth -> noised queries before the matching ones; None: no denoising.
            Without an `embed` of its own it uses that of the queries.
        num_classes: K; classes of the data are contiguous in [0, K).
        num_queries: learned anchors or chosen proposals, as the queries have it.
        num_patterns: learned patterns, as the queries have it; with P of them the decoder has
            Q = num_queries * P matching queries.
        classification: what the logits mean, as all parts have it.
        target_fields: further fields of the ground truth that the losses need, such as `gt_masks`;
            the targets have them without `gt_`.
        key_maps: layouts of other code bases whose checkpoints fit the model.
        pixel_mean: mean of R, G, B in [0, 255].
        pixel_std: standard deviation of R, G, B.

    Attributes:
        diagnostics: of the last forward pass in training, or None before the first.

    Raises:
        ValueError: no class; parts do not agree about queries, patterns, classes, classification
            or the kind of position; the neck expects other maps than the backbone gives.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        position_embedding: nn.Module,
        queries: nn.Module,
        transformer: Transformer,
        heads: DetectionHeads,
        criterion: DetectionCriterion,
        postprocess: PostProcess,
        denoising: QueryDenoising | None = None,
        *,
        num_classes: int,
        num_queries: int,
        num_patterns: int = 0,
        classification: Classification | None = None,
        target_fields: Sequence[str] = (),
        key_maps: Sequence[Layout] = (),
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes {num_classes} must be at least 1")
        if num_patterns and isinstance(queries, ProposalQueries):
            raise ValueError(
                f"num_patterns is {num_patterns}, but queries that the encoder proposes "
                "(two-stage) have no patterns; set model.num_patterns=0"
            )
        classification = classification or FocalClassification()
        if denoising is not None and denoising.embed is None:
            denoising.embed = getattr(queries, "embed", None)
        embed = getattr(denoising, "embed", None)
        _check_agreement("num_queries", num_queries, queries)
        _check_agreement("num_patterns", num_patterns, queries)
        _check_agreement("num_classes", num_classes, heads, denoising, embed, queries)
        _check_agreement("classification", classification, heads, queries, postprocess)
        if (kind := getattr(queries, "position_kind", None)) is not None:
            _check_agreement("position_kind", kind, getattr(transformer, "decoder", None), embed)
        for kind in ("channels", "strides"):
            given = getattr(backbone, f"out_{kind}", None)
            expected = getattr(neck, f"in_{kind}", None)
            if given is not None and expected is not None and list(given) != list(expected):
                raise ValueError(
                    f"the backbone gives maps of {kind} {list(given)}, the neck expects "
                    f"{list(expected)}; set model.neck.in_{kind}"
                )
        self.backbone = backbone
        self.neck = neck
        self.position_embedding = position_embedding
        self.queries = queries
        self.transformer = transformer
        self.heads = heads
        self.criterion = criterion
        self.postprocess = postprocess
        self.denoising = denoising
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.num_patterns = num_patterns
        self.classification = classification
        self.target_fields = tuple(target_fields)
        self.key_maps = as_layouts(key_maps)
        self.diagnostics: Diagnostics | None = None
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(
        self, samples: Sequence[dict[str, Any]], counts: ObjectCounts | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training, detections in evaluation.

        Args:
            samples: per image `image` (3, H, W) uint8 or float RGB in [0, 255]; `height` and
                `width` of the original, by default those of `image`; in training
                `instances` with `gt_boxes` (XYXY pixels of `image`) and `gt_classes`, and
                optionally `seed`, of which the denoising noise is a function.
            counts: what the losses are divided by, for a step over several batches: their
                `count_objects`, added up, and then `mean_over_ranks`. The losses of the
                batches then add up to those of all images in one batch. By default those of
                `samples` alone, which with several processes is a collective call.

        Returns:
            In training a dict of scalars, already weighted. In evaluation one
            `{"instances": Instances}` per image, see `PostProcess`.

        Raises:
            ValueError: a sample without ground truth in training, or with classes or images that
                do not fit the model.
        """
        images, mask = self.preprocess(samples)
        if self.training:
            targets = self.prepare_targets(samples)
            seeds = [s["seed"] for s in samples] if all("seed" in s for s in samples) else None
            return self.losses(images, mask, targets, seeds, counts)
        outputs = self.forward_tensors(images, mask)
        found = self.postprocess(outputs, [original_size(sample) for sample in samples])
        return [{"instances": instances} for instances in found]

    def count_objects(self, samples: Sequence[dict[str, Any]]) -> ObjectCounts:
        """Number of objects and of noised boxes that a training batch gives in this process.

        Nothing is computed on the device. Where empty denoising slots are visible
        (`mask_empty_slots=False`) the fullest image of a batch decides how many slots the others
        see and how often they are noised; batches then do not add up to one of all images.

        Args:
            samples: see `forward`.

        Raises:
            ValueError: a sample without ground truth.
        """
        return self._count([len(ground_truth_of(sample).gt_classes) for sample in samples])

    def _count(self, num_objects: Sequence[int]) -> ObjectCounts:
        noised = 0 if self.denoising is None else self.denoising.num_noised(num_objects)
        num_queries = self.num_queries * max(self.num_patterns, 1)
        pairs = sum(min(number, num_queries) for number in num_objects)
        weights = self.classification.total_weight(pairs, num_queries * len(num_objects))
        return ObjectCounts(sum(num_objects), noised, weights)

    def preprocess(self, samples: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Normalise and pad the images.

        Args:
            samples: see `forward`.

        Returns:
            images (B, 3, H, W) float, normalised, zeros in the padding; mask (B, H, W) bool,
            True = padding.

        Raises:
            ValueError: see `images_of`.
        """
        mean, std = self.pixel_mean, self.pixel_std
        images = [image.to(mean.device, mean.dtype) for image in images_of(samples)]
        return pad_images([(image - mean) / std for image in images])

    def prepare_targets(self, samples: Sequence[dict[str, Any]]) -> Targets:
        """See `targets_of`."""
        return targets_of(samples, self.num_classes, self.pixel_mean.device, self.target_fields)

    def losses(
        self,
        images: Tensor,
        mask: Tensor,
        targets: Targets,
        seeds: Sequence[int] | None = None,
        counts: ObjectCounts | None = None,
    ) -> dict[str, Tensor]:
        """Weighted training losses; sets `diagnostics`.

        Args:
            images: (B, 3, H, W) normalised.
            mask: (B, H, W) bool, True = padding.
            targets: see `prepare_targets`.
            seeds: of the denoising noise, one per image.
            counts: divisors of the losses, see `forward`.
        """
        if counts is None:
            own = self._count([len(target["labels"]) for target in targets])
            counts = mean_over_ranks(own, images.device)
        memory = self.encode(images, mask)
        queries: Queries = self.queries(memory)
        noised: NoisedQueries | None = None
        if self.denoising is None:
            outputs = self.decode(memory, queries.content, queries.position)
        else:
            noised = self.denoising(targets, queries.content, queries.position, seeds)
            joint = self.decode(memory, noised.content, noised.position, noised.attention_mask)
            denoised, outputs = noised.split(joint)
        pairs: Pairs = self.criterion.matcher(outputs, targets)
        pairs = replace(pairs, total_weight=counts.weights)
        losses: dict[str, Tensor] = self.criterion(outputs, targets, pairs, count=counts.matching)
        correct, total = torch.zeros((), dtype=torch.long, device=images.device), 0
        if self.denoising is not None and noised is not None:
            classified = counts.denoising * (1 + self.denoising.num_negatives)
            weight = self.classification.total_weight(counts.denoising, classified)
            of_noise = replace(noised.pairs, total_weight=weight)
            losses |= self.criterion(
                denoised, targets, of_noise, count=counts.denoising, suffix="_dn"
            )
            logits = noised.pairs.predictions(denoised["pred_logits"][-1:].detach())
            predicted = logits[..., : self.num_classes].argmax(-1)
            correct = (predicted == noised.pairs.objects(targets, "labels")).sum()
            total = len(noised.pairs)
        if (proposals := queries.proposals) is not None:
            if proposals.class_agnostic:
                targets = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            found = self.criterion.matcher(proposals.outputs, targets, proposals.padding)
            found = replace(found, total_weight=counts.weights)
            losses |= self.criterion(
                proposals.outputs, targets, found, count=counts.matching, suffix="_enc"
            )
        self.diagnostics = Diagnostics(pairs.query_of_object, correct, total)
        return losses

    def forward_tensors(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Predictions of the last decoder layer, tensors in and tensors out.

        Args:
            images: (B, 3, H, W) normalised.
            mask: (B, H, W) bool, True = padding.

        Returns:
            `pred_logits` (B, Q, L), `pred_boxes` (B, Q, 4) as (cx, cy, w, h) in [0, 1] of each
            unpadded image, and what else the heads predict, (B, Q, ...).
        """
        memory = self.encode(images, mask)
        queries = self.queries(memory)
        outputs = self.decode(memory, queries.content, queries.position)
        return {name: layers[-1] for name, layers in outputs.items()}

    def encode(self, images: Tensor, mask: Tensor) -> Memory:
        """Images (B, 3, H, W) and their padding (B, H, W) -> encoded feature maps."""
        maps, masks = self.neck(self.backbone(images, mask), mask)
        positions = [self.position_embedding(level_mask) for level_mask in masks]
        return self.transformer.encode(maps, masks, positions)

    def decode(
        self,
        memory: Memory,
        content: Tensor,
        position: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Outputs:
        """Predictions of all decoder layers.

        Args:
            memory: the encoded feature maps.
            content: (B, Q, C).
            position: (B, Q, P), see `PositionKind`.
            attention_mask: (B, Q, Q) bool, True = blocked; None: every query sees every other.
        """
        states, references = self.transformer.decoder(
            content, position, memory, self.heads, attention_mask
        )
        outputs: Outputs = self.heads(states, references, memory)
        shape = states.shape[:3]
        given = outputs if isinstance(outputs, dict) else {"outputs": outputs}
        wrong = [
            f"{name} {shape_of(x)}"
            for name, x in given.items()
            if not isinstance(x, Tensor) or x.shape[:3] != shape
        ]
        if wrong or not {"pred_logits", "pred_boxes"} <= given.keys():
            raise UserError(
                f"model.heads: {type(self.heads).__name__} must return a dict of pred_logits, "
                "pred_boxes and what else it predicts, each (layers, images, queries, ...) = "
                f"({', '.join(map(str, shape))}, ...), not {', '.join(wrong) or sorted(given)}"
            )
        return outputs

    def checkpoint_activations(
        self, *, backbone: bool = False, encoder: bool = False, decoder: bool = False
    ) -> None:
        """Choose which parts recompute their activations in the backward pass of training.

        It costs another forward pass of each chosen part and saves most of its memory. Losses and
        gradients stay the same, bit for bit, and so does the state_dict.

        Args:
            backbone: stage by stage.
            encoder: layer by layer.
            decoder: layer by layer.

        Raises:
            ValueError: a chosen part does not support it.
        """
        part: Any
        for name, part, chosen in (
            ("backbone", self.backbone, backbone),
            ("encoder", self.transformer.encoder, encoder),
            ("decoder", self.transformer.decoder, decoder),
        ):
            if hasattr(part, "activation_checkpointing"):
                part.activation_checkpointing = chosen
            elif chosen:
                raise ValueError(
                    f"the {name} {type(part).__name__} does not support activation checkpointing; "
                    f"switch it off for the {name}, or give the class an attribute "
                    "activation_checkpointing and run its layers by "
                    "dn_detr.layers.run_checkpointed"
                )

    def class_tensors(self) -> list[str]:
        """Names, in the state_dict, of the tensors that have a row per class.

        They cannot come from a checkpoint of other classes. Each part names its own.
        """
        return [
            f"{name}.{tensor}"
            for name, part in self.named_modules()
            if part is not self
            for tensor in getattr(part, "class_tensors", list)()
        ]


def _check_agreement(name: str, value: Any, *parts: Any) -> None:
    for part in parts:
        if getattr(part, name, value) != value:
            raise ValueError(f"{name} is {value}, {type(part).__name__} has {getattr(part, name)}")
