"""The batched matcher against scipy on one image and layer at a time."""

from __future__ import annotations

import pytest
import torch
import torchvision.ops as reference
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dn_detr.modeling import (
    BoxGIoUCost,
    BoxL1Cost,
    ClassificationCost,
    FocalClassification,
    HungarianMatcher,
    MatchingCost,
)


def _problem(counts: list[int], layers: int = 3, queries: int = 7, classes: int = 4):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, len(counts), queries, classes, generator=generator)
    boxes = torch.rand(layers, len(counts), queries, 4, generator=generator) * 0.4 + 0.2
    targets = [
        {
            "labels": torch.randint(classes, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.2,
        }
        for n in counts
    ]
    return {"pred_logits": logits, "pred_boxes": boxes}, targets


def _cost_of_one(logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
    """The published cost, with torchvision's GIoU."""
    p = logits.double().sigmoid()[:, target["labels"]]
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    l1 = (boxes[:, None] - target["boxes"][None]).abs().sum(-1)
    corners = [reference.box_convert(b, "cxcywh", "xyxy") for b in (boxes, target["boxes"])]
    return 5 * l1 + 2 * focal - 2 * reference.generalized_box_iou(*corners)


def test_every_layer_and_image_gets_scipys_assignment():
    counts = [3, 0, 5]
    outputs, targets = _problem(counts)
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    matching = HungarianMatcher()(outputs, targets)
    offset = 0
    for image, count in enumerate(counts):
        ours = matching.image == image
        for layer in range(3):
            cost = _cost_of_one(logits[layer, image], boxes[layer, image], targets[image])
            rows, columns = linear_sum_assignment(cost)
            assert matching.query[layer, ours].tolist() == rows.tolist()
            assert (matching.target[layer, ours] - offset).tolist() == columns.tolist()
        offset += count


def test_cost_is_the_published_one():
    outputs, targets = _problem([4, 2])
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    cost = HungarianMatcher().cost(outputs, targets)
    for image, count in enumerate((4, 2)):
        expected = _cost_of_one(logits[1, image], boxes[1, image], targets[image]).float()
        torch.testing.assert_close(cost[1, image, :, :count], expected, rtol=1e-4, atol=1e-4)


def test_every_cost_counts_with_its_weight():
    problem = _problem([4])

    def cost(by_class: float, bbox: float, giou: float) -> Tensor:
        costs = {
            "cost_class": ClassificationCost(FocalClassification(), weight=by_class),
            "cost_bbox": BoxL1Cost(bbox),
            "cost_giou": BoxGIoUCost(giou),
        }
        return HungarianMatcher(costs).cost(*problem)

    parts = cost(1.0, 0.0, 0.0), cost(0.0, 1.0, 0.0), cost(0.0, 0.0, 1.0)
    torch.testing.assert_close(cost(3.0, 4.0, 5.0), 3 * parts[0] + 4 * parts[1] + 5 * parts[2])


def test_classification_decides_the_cost_of_a_class():
    problem = _problem([4])
    costs = [
        ClassificationCost(FocalClassification(alpha=alpha))(*problem) for alpha in (0.25, 0.5)
    ]
    assert not torch.allclose(*costs)


def test_queries_of_objects_are_the_pairs_of_the_last_layer():
    matching = HungarianMatcher()(*_problem([3, 0, 5]))
    assert [len(queries) for queries in matching.query_of_object] == [3, 0, 5]
    found = torch.cat(matching.query_of_object)
    assert torch.equal(found[matching.target[-1]], matching.query[-1])


def test_more_objects_than_queries_keep_every_query():
    matching = HungarianMatcher()(*_problem([9], queries=7))
    assert matching.query[0].tolist() == list(range(7))
    assert len(set(matching.target[0].tolist())) == 7


def test_no_objects_match_nothing():
    matching = HungarianMatcher()(*_problem([0, 0]))
    assert matching.image.shape == (0,) and matching.query.shape == (3, 0)


def test_predictions_that_are_not_finite_still_match():
    outputs, targets = _problem([3])
    outputs["pred_logits"] *= torch.nan
    matching = HungarianMatcher()(outputs, targets)
    assert matching.query.shape == (3, 3)


def test_all_layers_leave_the_device_in_one_copy(monkeypatch):
    copies = []
    to_cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.shape) or to_cpu(self))
    HungarianMatcher()(*_problem([3, 2]))
    assert copies == [(3, 2, 7, 3)]


@pytest.mark.parametrize("shape", [(), (2, 7, 3), (3, 2, 7, 1)])
def test_a_cost_of_another_shape_is_named(shape):
    class Wrong(MatchingCost):
        def forward(self, outputs, targets):
            return torch.zeros(shape)

    matcher = HungarianMatcher({"cost_wrong": Wrong()})
    with pytest.raises(ValueError, match=r"costs\.cost_wrong: Wrong must .*\(3, 2, 7, 3\), not"):
        matcher(*_problem([3, 1]))


class Constant(MatchingCost):
    """A cost that is a given number, and another one beyond an image's own objects."""

    def __init__(self, number: float, beyond: float = 0.0) -> None:
        super().__init__()
        self.number, self.beyond = number, beyond

    def forward(self, outputs, targets):
        counts = torch.tensor([len(target["labels"]) for target in targets])[:, None, None]
        inside = torch.arange(counts.max()) < counts
        own = torch.where(inside, self.number, self.beyond)  # (B, 1, T)
        return own.expand(*outputs["pred_logits"].shape[:3], -1)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_cost_that_is_not_finite_is_named(number):
    matcher = HungarianMatcher({"cost_bbox": BoxL1Cost(), "cost_mine": Constant(number)})
    with pytest.raises(ValueError, match=r"costs\.cost_mine: Constant gives costs .* not finite"):
        matcher(*_problem([3, 1]))


def test_costs_beyond_the_own_objects_of_an_image_may_be_anything():
    problem = _problem([3, 1])
    plain = HungarianMatcher({"cost_bbox": BoxL1Cost()})
    matcher = HungarianMatcher({"cost_bbox": BoxL1Cost(), "cost_mine": Constant(0.0, torch.nan)})
    assert torch.equal(matcher(*problem).query, plain(*problem).query)
