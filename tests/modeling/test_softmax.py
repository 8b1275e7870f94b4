"""Softmax with a class "nothing": numbers that the original DETR printed, and a whole detector."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dn_detr.config import LazyCall as L
from dn_detr.config import instantiate
from dn_detr.modeling import (
    BoxGIoUCost,
    BoxL1Cost,
    ClassificationCost,
    ClassificationLoss,
    DetectionCriterion,
    HungarianMatcher,
    PostProcess,
    SoftmaxClassification,
)
from dn_detr.modeling.losses import BoxGIoULoss, BoxL1Loss
from dn_detr.structures import box_xyxy_to_cxcywh

from .conftest import make_sample
from .goldens import assert_near, load_arrays, load_module

COUNTS = {"train": (5, 3), "train_oneempty": (2, 0), "train_allempty": (0, 0)}
TERMS = ("loss_ce", "loss_bbox", "loss_giou")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    arrays = load_arrays(shared / "golden/detr/detr_r50.npz")
    rules = load_module(shared / "golden/detr/fill.py")
    meta = json.loads(bytes(arrays["meta_json"]).decode())
    return {**arrays, "rules": rules, "meta": meta}


@pytest.fixture
def outputs(golden) -> dict[str, Tensor]:
    """Of the last layer; without dropout those of training are those of evaluation."""
    names = ("pred_logits", "pred_boxes")
    return {name: torch.from_numpy(golden[f"eval_{name}"])[None] for name in names}


def _targets(golden: dict[str, Any], counts: tuple[int, int]) -> list[dict[str, Tensor]]:
    rules = golden["rules"]
    targets = []
    for target, (height, width) in zip(rules.targets(counts, 91), rules.IMAGE_SIZES, strict=True):
        boxes = torch.from_numpy(target["boxes_xyxy"]) / torch.tensor([width, height] * 2)
        labels = torch.from_numpy(target["labels"])
        targets.append({"labels": labels, "boxes": box_xyxy_to_cxcywh(boxes)})
    return targets


def _criterion() -> DetectionCriterion:
    """DETR's terms, each with weight 1 in the loss."""
    softmax = SoftmaxClassification()
    costs = {
        "cost_class": ClassificationCost(softmax, weight=1.0),
        "cost_bbox": BoxL1Cost(5.0),
        "cost_giou": BoxGIoUCost(2.0),
    }
    losses = (ClassificationLoss(softmax), BoxL1Loss(), BoxGIoULoss())
    return DetectionCriterion(dict(zip(TERMS, losses, strict=True)), HungarianMatcher(costs))


@pytest.mark.parametrize("run", list(COUNTS))
def test_matching_and_losses_are_those_of_detr(golden, outputs, run):
    criterion, targets = _criterion(), _targets(golden, COUNTS[run])
    pairs = criterion.matcher(outputs, targets)
    first = 0
    for image, (queries, objects) in enumerate(golden["meta"][f"{run}_matches"][0]):
        mine = pairs.image == image
        assert pairs.query[0, mine].tolist() == queries
        assert (pairs.target[0, mine] - first).tolist() == objects
        first += len(targets[image]["labels"])
    losses = criterion(outputs, targets, pairs, count=max(len(pairs), 1))
    expected = {name: golden["meta"][f"{run}_losses"][name] for name in TERMS}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        expected, rel=5e-5
    )


@pytest.mark.parametrize("image", [0, 1])
def test_detections_are_those_of_detr(golden, outputs, image):
    last = {name: output[-1, image : image + 1] for name, output in outputs.items()}
    (found,) = PostProcess(100, SoftmaxClassification())(last, [golden["rules"].ORIG_SIZES[image]])
    printed = {name: golden[f"eval_post{image}_{name}"] for name in ("scores", "labels", "boxes")}
    order = torch.from_numpy(printed["scores"]).sort(descending=True).indices
    assert_near(found.scores, printed["scores"][order], 1e-6)
    assert torch.equal(found.pred_classes, torch.from_numpy(printed["labels"])[order].long())
    assert_near(found.pred_boxes.tensor, printed["boxes"][order], 1e-3)


def test_noised_queries_have_the_mean_cross_entropy():
    logits = torch.randn(2, 7, 4)
    labels = torch.randint(3, (2, 7))
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]
    )
    torch.testing.assert_close(SoftmaxClassification().loss(logits, labels, 1), expected)


def test_without_queries_the_loss_is_zero_in_the_graph():
    logits = torch.zeros(2, 0, 4, requires_grad=True)
    loss = SoftmaxClassification().loss(logits, torch.zeros(2, 0, dtype=torch.long), 1)
    assert loss.tolist() == [0, 0] and loss.requires_grad


def test_one_line_of_the_config_makes_a_detector_classify_with_softmax(family_config):
    if family_config.denoising is None:
        pytest.skip("the models with denoising have every part that classifies")
    family_config.classification = L(SoftmaxClassification)(no_object_weight=0.2)
    detector = instantiate(family_config)
    samples = [make_sample(64, 80, count, seed) for seed, count in enumerate((2, 0))]
    losses = detector(samples)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(len(p) == 11 for n, p in detector.named_parameters() if "class_embed" in n)
    detector.eval()
    (found, _) = (result["instances"] for result in detector(samples))
    assert len(found) == len(found.pred_boxes) and found.pred_classes.max() < 10


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_of_nothing_that_is_no_weight_is_refused(weight):
    with pytest.raises(ValueError, match=f"no_object_weight {weight} must"):
        SoftmaxClassification(no_object_weight=weight)
