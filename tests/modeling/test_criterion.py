"""The set loss: normalisation, names and batches without objects."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dn_detr.errors import UserError
from dn_detr.modeling import (
    NOTHING,
    BoxL1Loss,
    ClassificationLoss,
    DetectionCriterion,
    FocalClassification,
    LossTerm,
    Pairs,
)

LAYERS, QUERIES, CLASSES = 2, 5, 3


def _predictions(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES, generator=generator)
    boxes = torch.rand(LAYERS, batch, QUERIES, 4, generator=generator) * 0.3 + 0.3
    return {"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}


def _match(criterion, outputs, targets, ignored=None, **options) -> dict[str, torch.Tensor]:
    """Losses of the pairs that the matcher finds, divided by their number."""
    pairs = criterion.matcher(outputs, targets, ignored)
    return criterion(outputs, targets, pairs, count=max(len(pairs), 1), **options)


def _targets(counts: list[int]):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "labels": torch.randint(CLASSES, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.3 + 0.3,
        }
        for n in counts
    ]


def test_focal_loss_with_gamma_zero_is_weighted_cross_entropy():
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[0, NOTHING, 2, 1], [NOTHING, NOTHING, 1, 1]])
    one_hot = (labels[..., None] == torch.arange(3)).float()
    entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    expected = (entropy * torch.where(one_hot > 0, 0.25, 0.75)).sum((1, 2)) / 5
    torch.testing.assert_close(FocalClassification(gamma=0.0).loss(logits, labels, 5), expected)


def test_losses_are_named_by_layer():
    losses = _match(DetectionCriterion(), _predictions(2), _targets([2, 1]))
    terms = ("loss_ce", "loss_bbox", "loss_giou")
    assert set(losses) == {f"{term}{layer}" for term in terms for layer in ("", "_0")}


def test_weights_multiply_their_term():
    outputs, targets = _predictions(1), _targets([2])
    plain = _match(DetectionCriterion(), outputs, targets)
    terms = {
        "loss_bbox": BoxL1Loss(10.0),
        "loss_ce": ClassificationLoss(FocalClassification(), weight=3.0),
    }
    heavy = _match(DetectionCriterion(terms), outputs, targets)
    torch.testing.assert_close(heavy["loss_bbox"], 2 * plain["loss_bbox"])
    torch.testing.assert_close(heavy["loss_ce_0"], 3 * plain["loss_ce_0"])
    assert "loss_giou" not in heavy


def test_count_divides_every_term():
    outputs, targets = _predictions(1), _targets([2])
    criterion = DetectionCriterion()
    pairs = criterion.matcher(outputs, targets)
    one, four = (criterion(outputs, targets, pairs, count=count) for count in (1.0, 4.0))
    assert all(torch.equal(four[name], value / 4) for name, value in one.items())


def test_loss_of_a_batch_is_the_mean_of_its_images_weighted_by_their_objects():
    criterion, outputs, targets = DetectionCriterion(), _predictions(2), _targets([3, 1])
    both = _match(criterion, outputs, targets)
    alone = [
        _match(criterion, {k: v[:, i : i + 1] for k, v in outputs.items()}, [targets[i]])
        for i in (0, 1)
    ]
    for name, value in both.items():
        expected = (3 * alone[0][name] + 1 * alone[1][name]) / 4
        torch.testing.assert_close(value, expected)


def test_without_objects_box_losses_are_zeros_in_the_graph():
    outputs = _predictions(2)
    losses = _match(DetectionCriterion(), outputs, _targets([0, 0]))
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["loss_ce"] > 0
    torch.stack(list(losses.values())).sum().backward()
    gradient = outputs["pred_boxes"].grad
    assert gradient is not None and not gradient.any()


def test_ignored_queries_are_neither_matched_nor_trained():
    outputs, targets = _predictions(2), _targets([2, 1])
    ignored = torch.zeros(2, QUERIES, dtype=torch.bool)
    ignored[0, :2] = ignored[1, 3] = True
    with torch.no_grad():  # the ignored ones would fit best
        outputs["pred_boxes"][:, 0, :2] = targets[0]["boxes"]
        outputs["pred_boxes"][:, 1, 3] = targets[1]["boxes"][0]
    losses = _match(DetectionCriterion(), outputs, targets, ignored)
    torch.stack(list(losses.values())).sum().backward()
    for output in outputs.values():
        assert not output.grad[:, ignored].any() and output.grad[:, ~ignored].any()


def test_ignoring_queries_is_the_same_as_not_having_them():
    criterion, outputs, targets = DetectionCriterion(), _predictions(1), _targets([2])
    ignored = torch.tensor([[False, True, False, False, True]])
    kept = {name: output[:, :, ~ignored[0]] for name, output in outputs.items()}
    expected = _match(criterion, kept, targets)
    found = _match(criterion, outputs, targets, ignored)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_classified_queries_without_a_pair_are_to_predict_nothing():
    outputs, targets = _predictions(1), _targets([1])
    index = torch.tensor
    classified = index([0, 0]), index([1, 4])
    pairs = Pairs(index([0]), index([[4]]), index([[0]]), classified)
    losses = DetectionCriterion()(outputs, targets, pairs, count=1)
    torch.stack([losses["loss_ce"], losses["loss_ce_0"]]).sum().backward()
    gradient = outputs["pred_logits"].grad[:, 0]
    label = targets[0]["labels"][0]
    assert not gradient[:, [0, 2, 3]].any()
    assert (gradient[:, 1] > 0).all() and (gradient[:, 4, label] < 0).all()


def test_suffix_names_the_losses():
    losses = _match(DetectionCriterion(), _predictions(1), _targets([1]), suffix="_enc")
    assert {"loss_ce_enc", "loss_giou_enc_0"} <= set(losses)


def test_a_term_that_says_nothing_is_refused():
    with pytest.raises(UserError, match="Mine must define sums, or forward"):
        type("Mine", (LossTerm,), {})(weight=2.0)


@pytest.mark.parametrize("returned", [torch.zeros(()), torch.zeros(3), torch.zeros(2, 3), 0.0])
def test_a_term_that_returns_anything_but_a_number_per_layer_is_named(returned):
    class Wrong(LossTerm):
        def forward(self, *args):
            return returned

    criterion = DetectionCriterion({"loss_wrong": Wrong()})
    with pytest.raises(ValueError, match=r"losses\.loss_wrong: Wrong must .* \(2,\), not"):
        _match(criterion, _predictions(1), _targets([1]))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *[("alpha", -0.1), ("alpha", 1.1), ("alpha", math.nan)],
        *[("gamma", -1.0), ("gamma", math.inf), ("prior", 0.0), ("prior", 1.0)],
    ],
)
def test_a_focal_loss_of_meaningless_numbers_is_refused(name, number):
    with pytest.raises(ValueError, match=rf"{name} {number} must lie"):
        FocalClassification(**{name: number})
