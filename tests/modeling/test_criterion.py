"""The set loss: normalisation, names and batches without objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dn_detr.modeling import DetectionCriterion, HungarianMatcher
from dn_detr.modeling.losses import focal_loss

LAYERS, QUERIES, CLASSES = 2, 5, 3


def _predictions(batch: int):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, batch, QUERIES, CLASSES, generator=generator)
    boxes = torch.rand(LAYERS, batch, QUERIES, 4, generator=generator) * 0.3 + 0.3
    return logits.requires_grad_(), boxes.requires_grad_()


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
    one_hot = (torch.rand(2, 4, 3) < 0.3).float()
    entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    expected = (entropy * torch.where(one_hot > 0, 0.25, 0.75)).sum((1, 2))
    torch.testing.assert_close(focal_loss(logits, one_hot, alpha=0.25, gamma=0.0), expected)


def test_losses_are_named_by_layer():
    losses = DetectionCriterion(HungarianMatcher())(*_predictions(2), _targets([2, 1]))
    terms = ("loss_ce", "loss_bbox", "loss_giou")
    assert set(losses) == {f"{term}{layer}" for term in terms for layer in ("", "_0")}


def test_weights_multiply_their_term():
    predictions, targets = _predictions(1), _targets([2])
    plain = DetectionCriterion(HungarianMatcher())(*predictions, targets)
    weights = {"loss_ce": 1.0, "loss_bbox": 10.0, "loss_giou": 2.0}
    heavy = DetectionCriterion(HungarianMatcher(), weights=weights)(*predictions, targets)
    torch.testing.assert_close(heavy["loss_bbox"], 2 * plain["loss_bbox"])
    torch.testing.assert_close(heavy["loss_giou"], plain["loss_giou"])


def test_loss_of_a_batch_is_the_mean_of_its_images_weighted_by_their_objects():
    criterion = DetectionCriterion(HungarianMatcher())
    logits, boxes = _predictions(2)
    targets = _targets([3, 1])
    both = criterion(logits, boxes, targets)
    alone = [criterion(logits[:, i : i + 1], boxes[:, i : i + 1], [targets[i]]) for i in (0, 1)]
    for name, value in both.items():
        expected = (3 * alone[0][name] + 1 * alone[1][name]) / 4
        torch.testing.assert_close(value, expected)


def test_without_objects_box_losses_are_zeros_in_the_graph():
    logits, boxes = _predictions(2)
    losses = DetectionCriterion(HungarianMatcher())(logits, boxes, _targets([0, 0]))
    assert losses["loss_bbox"] == 0 and losses["loss_giou"] == 0 and losses["loss_ce"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert boxes.grad is not None and not boxes.grad.any()


def test_ignored_queries_are_neither_matched_nor_trained():
    criterion, (logits, boxes) = DetectionCriterion(HungarianMatcher()), _predictions(2)
    ignored = torch.zeros(2, QUERIES, dtype=torch.bool)
    ignored[0, :2] = ignored[1, 3] = True
    targets = _targets([2, 1])
    with torch.no_grad():  # the ignored ones would fit best
        boxes[:, 0, :2] = targets[0]["boxes"]
        boxes[:, 1, 3] = targets[1]["boxes"][0]
    losses = criterion(logits, boxes, targets, ignored=ignored)
    torch.stack(list(losses.values())).sum().backward()
    for gradient in (logits.grad, boxes.grad):
        assert not gradient[:, ignored].any() and gradient[:, ~ignored].any()


def test_ignoring_queries_is_the_same_as_not_having_them():
    criterion, (logits, boxes) = DetectionCriterion(HungarianMatcher()), _predictions(1)
    ignored = torch.tensor([[False, True, False, False, True]])
    keep = ~ignored[0]
    targets = _targets([2])
    expected = criterion(logits[:, :, keep], boxes[:, :, keep], targets)
    found = criterion(logits, boxes, targets, ignored=ignored)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_suffix_names_the_losses():
    losses = DetectionCriterion(HungarianMatcher())(*_predictions(1), _targets([1]), suffix="_enc")
    assert {"loss_ce_enc", "loss_giou_enc_0"} <= set(losses)
