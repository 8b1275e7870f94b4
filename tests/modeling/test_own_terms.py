"""A project's loss term, matching cost and ground-truth field, each by one line of its config."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from dn_detr.config import LazyCall as L
from dn_detr.config import instantiate
from dn_detr.errors import UserError
from dn_detr.modeling import LossTerm, MatchingCost, Pairs, SoftmaxClassification, pad_targets

from .conftest import make_sample, small_model_config


class CentreLoss(LossTerm):
    """Distance between the centres."""

    def sums(self, outputs, targets, pairs):
        centres = pairs.predictions(outputs["pred_boxes"])[..., :2]
        return (centres - pairs.objects(targets, "boxes")[..., :2]).abs().sum((1, 2))


class DepthLoss(LossTerm):
    """A field of the ground truth that the library does not know, against the width of a box."""

    def sums(self, outputs, targets, pairs):
        width = pairs.predictions(outputs["pred_boxes"])[..., 2]
        return (width - pairs.objects(targets, "depth")).abs().sum(1)


class FirstQueriesCost(MatchingCost):
    """Every object prefers the queries with the lowest index."""

    def forward(self, outputs, targets):
        queries = torch.arange(outputs["pred_boxes"].shape[2])[:, None]
        labels = pad_targets(targets, "labels")
        return queries.expand(*outputs["pred_boxes"].shape[:3], labels.shape[1])


def _samples() -> list[dict]:
    return [make_sample(64, 80, count, seed) for seed, count in enumerate((2, 3))]


def _two_stage():
    return small_model_config("dino_r50")


def test_a_term_of_a_project_trains_matching_denoising_proposals_and_every_layer():
    cfg = _two_stage()
    cfg.criterion.losses.loss_centre = L(CentreLoss)(weight=3.0)
    detector = instantiate(cfg)
    losses = detector(_samples())
    names = {f"loss_centre{part}{layer}" for part in ("", "_dn") for layer in ("", "_0", "_1")}
    assert {name for name in losses if "centre" in name} == names | {"loss_centre_enc"}
    for name in names:
        losses[name].backward(retain_graph=True)
        assert any(p.grad.any() for p in detector.parameters() if p.grad is not None), name
        detector.zero_grad()
    # The L1 loss has the distance of the centres in it, with weight 5.
    assert all(losses[n] / 3 < losses[n.replace("centre", "bbox")] / 5 for n in names)


def test_a_cost_of_a_project_decides_the_matching(small_config):
    small_config.criterion.matcher.costs.cost_first = L(FirstQueriesCost)(weight=1e4)
    detector = instantiate(small_config)
    detector(_samples())
    assert [sorted(q.tolist()) for q in detector.diagnostics.queries] == [[0, 1], [0, 1, 2]]


def test_a_field_of_the_ground_truth_reaches_the_losses(small_config):
    small_config.target_fields = ["gt_depth"]
    small_config.criterion.losses.loss_depth = L(DepthLoss)(weight=1.0)
    detector, samples = instantiate(small_config), _samples()
    with pytest.raises(ValueError, match="image 0: the ground truth has no gt_depth"):
        detector(samples)
    for sample in samples:
        sample["instances"].gt_depth = torch.rand(len(sample["instances"]))
    assert {"loss_depth", "loss_depth_dn_0"} <= set(detector(samples))


def test_a_term_can_be_taken_away(small_config):
    del small_config.criterion.losses.loss_giou
    losses = instantiate(small_config)(_samples())
    assert losses and not any("giou" in name for name in losses)


def test_parts_that_classify_otherwise_are_refused(small_config):
    small_config.heads.classification = L(SoftmaxClassification)()
    with pytest.raises(ValueError, match=r"classification is Focal.*DetectionHeads has Softmax"):
        instantiate(small_config)


def test_a_decoder_that_expects_another_kind_of_position_is_refused(small_config):
    small_config.queries.position_kind = "point"
    with pytest.raises(ValueError, match="position_kind is point, DeformableDecoder has box"):
        instantiate(small_config)


class UninitialisedLoss(CentreLoss):
    def __init__(self, weight=1.0):
        self.weight = weight


class UninitialisedCost(FirstQueriesCost):
    def __init__(self, weight=1.0):
        self.weight = weight


@pytest.mark.parametrize(
    ("part", "term"),
    [("losses", UninitialisedLoss), ("matcher.costs", UninitialisedCost)],
)
def test_a_term_that_is_not_initialised_is_named(small_config, part, term):
    OmegaConf.update(small_config.criterion, f"{part}.mine", L(term)(weight=1.0))
    message = rf"mine: {term.__name__}.__init__ must call super\(\).__init__\(\)"
    with pytest.raises(UserError, match=message):
        instantiate(small_config)


@pytest.mark.parametrize("weight", ["5", None, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["losses.loss_bbox", "matcher.costs.cost_giou"])
def test_a_weight_that_is_no_number_of_at_least_0_is_named(small_config, key, weight):
    OmegaConf.update(small_config.criterion, f"{key}.weight", weight)
    name = key.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"{name}\.weight must be a number of at least 0, not"):
        instantiate(small_config)


def test_a_field_that_the_targets_lack_is_named():
    pairs = Pairs(torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[0]]))
    with pytest.raises(UserError, match=r"have boxes, labels, not 'weights'; .*target_fields"):
        pairs.objects([{"labels": torch.zeros(1), "boxes": torch.zeros(1, 4)}], "weights")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda outputs: tuple(outputs.values()), "outputs tuple"),
        (lambda outputs: outputs | {"pred_quality": outputs["pred_boxes"][-1]}, "pred_quality"),
        (lambda outputs: {"pred_logits": outputs["pred_logits"]}, "pred_logits"),
    ],
)
def test_heads_that_return_something_else_are_named(small, monkeypatch, change, named):
    forward = small.heads.forward
    monkeypatch.setattr(small.heads, "forward", lambda *inputs: change(forward(*inputs)))
    with pytest.raises(UserError, match=rf"model\.heads: DetectionHeads must return.*{named}"):
        small([make_sample(64, 80, 1, 0)])
