"""Faster R-CNN of torchvision as a detector of the library, with box denoising.

Ren et al., "Faster R-CNN", 2015 (https://arxiv.org/abs/1506.01497); Li et al., "DN-DETR", extended
version, 2022, section 4.8 (https://arxiv.org/abs/2203.01305): noised boxes go into the box head
beside the proposals and regress their own object. The paper's code was not published; the divisor
of the loss and the bound on the number of boxes are ours.
Legend: K classes, C channels, R regions, M noised boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import anchor_utils, faster_rcnn, rpn
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from dn_detr.checkpoint import Layout, as_layouts
from dn_detr.errors import UserError, image_name
from dn_detr.modeling import ObjectCounts, QueryDenoising, Targets, inputs, mean_over_ranks
from dn_detr.structures import Boxes, Instances, box_cxcywh_to_xyxy

from .backbone import PyramidBackbone


class BoxPredictor(nn.Module):
    """torchvision's `FastRCNNPredictor`, with a row per class in each tensor.

    The background's scores have the last row, and there are no boxes for it.

    Args:
        num_classes: K.
        embed_dim: C.
    """

    def __init__(self, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.class_embed = nn.Linear(embed_dim, num_classes + 1)
        self.box_embed = nn.Linear(embed_dim, 4 * num_classes)
        for name, value in list(self.box_embed.named_parameters()):
            rows = value.detach().view(num_classes, 4, *value.shape[1:])
            setattr(self.box_embed, name, nn.Parameter(rows))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) -> scores (R, 1 + K) and deltas (R, 4 + 4 K), background first."""
        scores, boxes = self.class_embed, self.box_embed
        weight = F.pad(boxes.weight, (0, 0, 0, 0, 1, 0)).flatten(0, 1)
        bias = F.pad(boxes.bias, (0, 0, 1, 0)).flatten()
        return F.linear(x, scores.weight.roll(1, 0), scores.bias.roll(1)), F.linear(x, weight, bias)


def _unresized(image: Tensor, target: Any) -> tuple[Tensor, Any]:
    """Leave an image to torchvision's transform as it is; the loader has resized it."""
    return image, target


class FasterRCNN(faster_rcnn.FasterRCNN):
    """torchvision's Faster R-CNN with samples as input, see `dn_detr.protocols.Model`.

    Args:
        backbone: images -> maps by name.
        denoising: ground truth -> noised boxes; None: no denoising.
        num_classes: K; classes of the data are contiguous in [0, K), the background is none.
        anchor_sizes: of each map, in pixels.
        rpn_depth: filters before the region proposal network's heads.
        box_filters: channels of the box head's filters, each with batch normalisation.
        box_dims: channels of the linear layers after them; the last is C.
        denoise_classes: let the noised boxes be classified as well, which the paper does not.
        denoising_weight: factor of the losses of the noised boxes.
        key_maps: layouts of other code bases whose checkpoints fit the model.
        options: for torchvision's `FasterRCNN`, such as `box_score_thresh`.

    Raises:
        ValueError: no class, or `denoising` has other ones.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        denoising: QueryDenoising | None = None,
        *,
        num_classes: int,
        anchor_sizes: Sequence[Sequence[int]] = ((32,), (64,), (128,), (256,), (512,)),
        rpn_depth: int = 1,
        box_filters: Sequence[int] = (),
        box_dims: Sequence[int] = (1024, 1024),
        denoise_classes: bool = False,
        denoising_weight: float = 1.0,
        key_maps: Sequence[Layout] = (),
        **options: Any,
    ) -> None:
        if not 1 <= num_classes == getattr(denoising, "num_classes", num_classes):
            raise ValueError(f"num_classes {num_classes} must be at least 1, and of the denoising")
        shape, ratios = (backbone.out_channels, 7, 7), ((0.5, 1.0, 2.0),) * len(anchor_sizes)
        anchors = anchor_utils.AnchorGenerator(tuple(map(tuple, anchor_sizes)), ratios)
        super().__init__(
            backbone,
            rpn_anchor_generator=anchors,
            rpn_head=rpn.RPNHead(shape[0], anchors.num_anchors_per_location()[0], rpn_depth),
            box_head=faster_rcnn.FastRCNNConvFCHead(shape, box_filters, box_dims, nn.BatchNorm2d),
            box_predictor=BoxPredictor(num_classes, box_dims[-1]),
            **options,
        )
        self.transform.resize = _unresized
        self.denoising = denoising
        self.num_classes = num_classes
        self.denoise_classes = denoise_classes
        self.denoising_weight = denoising_weight
        self.key_maps = as_layouts(key_maps)
        self.roi_heads.register_forward_hook(self._denoise)

    def forward(
        self, samples: Sequence[dict[str, Any]], counts: ObjectCounts | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training, detections in evaluation; see `dn_detr.modeling.Detector.forward`.

        torchvision's losses are means over the sampled anchors and regions of a batch. Where a
        step has several batches, each counts by its share of the images.

        Raises:
            ValueError: see `Detector.forward`; or a box without area.
        """
        like = self.roi_heads.box_predictor.class_embed.weight
        images = [image.to(like) / 255 for image in inputs.images_of(samples)]
        if not self.training:
            sizes = [inputs.original_size(sample) for sample in samples]
            found = super().forward(images)
            found = self.transform.postprocess(found, [i.shape[-2:] for i in images], sizes)
            results = []
            for size, each in zip(sizes, found, strict=True):
                boxes, scores, classes = Boxes(each["boxes"]), each["scores"], each["labels"] - 1
                one = Instances(size, pred_boxes=boxes, scores=scores, pred_classes=classes)
                results.append({"instances": one})
            return results
        targets = self._targets(samples, like)
        counts = counts or mean_over_ranks(self.count_objects(samples), like.device)
        losses: dict[str, Tensor] = super().forward(images, targets)
        share, weight = len(samples) / counts.weights, self.denoising_weight
        return {
            name: value * weight / counts.denoising if name.endswith("_dn") else value * share
            for name, value in losses.items()
        }

    def count_objects(self, samples: Sequence[dict[str, Any]]) -> ObjectCounts:
        """Number of objects, of noised boxes, and of images as weights; see `Detector`."""
        objects = [len(inputs.ground_truth_of(sample).gt_classes) for sample in samples]
        noised = 0 if self.denoising is None else self.denoising.num_noised(objects)
        return ObjectCounts(sum(objects), noised, len(samples))

    def class_tensors(self) -> list[str]:
        """Names, in the state_dict, of the tensors that have a row per class."""
        return [f"roi_heads.box_predictor.{n}" for n in self.roi_heads.box_predictor.state_dict()]

    def _targets(self, samples: Sequence[dict[str, Any]], like: Tensor) -> Targets:
        """What torchvision asks for, boxes in pixels, and the noised boxes with their objects."""
        norm = inputs.targets_of(samples, self.num_classes, like.device)
        seeds = [s["seed"] for s in samples] if all("seed" in s for s in samples) else None
        if self.denoising is not None:
            noised = self.denoising.noise(norm, seeds, dtype=like.dtype)
        targets = []
        for index, sample in enumerate(samples):
            boxes_xyxy = inputs.ground_truth_boxes(sample).to(like)
            if not (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all():
                raise UserError(f"image {image_name(sample)}: a box without area; remove it")
            target = {"boxes": boxes_xyxy, "labels": norm[index]["labels"] + 1}
            if self.denoising is not None:
                own, (height, width) = noised.image == index, sample["image"].shape[-2:]
                moved = box_cxcywh_to_xyxy(noised.boxes[own]) * like.new_tensor([width, height] * 2)
                moved = clip_boxes_to_image(moved, (height, width))
                kept = remove_small_boxes(moved, min_size=1)
                target |= {"noised": moved[kept], "objects": noised.pairs.target[0][own][kept]}
            targets.append(target)
        return targets

    def _denoise(self, heads: Any, arguments: Any, output: Any) -> Any:
        """Add the sums over the noised boxes to the losses of torchvision's `RoIHeads`."""
        features, _, sizes, targets = arguments
        if not self.training or self.denoising is None:
            return output
        noised = [target["noised"] for target in targets]
        objects = torch.cat([target["objects"] for target in targets])
        labels = torch.cat([target["labels"] for target in targets])[objects]
        truth = torch.cat([target["boxes"] for target in targets])[objects]
        (deltas,) = heads.box_coder.encode([truth], [torch.cat(noised)])
        of_boxes = of_classes = deltas.sum()  # 0 without a box
        if len(labels):
            # A pass of their own: what the sampled regions give does not depend on them.
            x = heads.box_head(heads.box_roi_pool(features, noised, sizes))
            scores, found = heads.box_predictor(x)
            own = found.unflatten(1, (-1, 4))[torch.arange(len(labels)), labels]
            of_boxes = F.smooth_l1_loss(own, deltas, beta=1 / 9, reduction="sum")
            of_classes = F.cross_entropy(scores, labels, reduction="sum")
        losses = {"loss_box_reg_dn": of_boxes}
        losses |= {"loss_classifier_dn": of_classes} if self.denoise_classes else {}
        return output[0], output[1] | losses
