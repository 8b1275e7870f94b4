"""Batches of a step, each divided by the objects of all, add up to the step of one large batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dn_detr.config import LazyCall
from dn_detr.modeling import (
    Detector,
    ObjectCounts,
    QueryDenoising,
    SoftmaxClassification,
    mean_over_ranks,
)

from .conftest import FAMILIES, away_from_initialisation, make_sample

OBJECTS = [3, 0, 5, 1, 2, 4, 2, 0]  # of eight images
MICRO_BATCHES = {"2x4": [4, 4], "uneven": [5, 1, 2], "one without objects": [3, 4, 1]}
Gradients = dict[str, torch.Tensor]


def _samples(objects: list[int], width: int = 64) -> list[dict[str, Any]]:
    return [make_sample(48, width, count, seed) for seed, count in enumerate(objects)]


def _split(samples: list[Any], sizes: list[int]) -> list[list[Any]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [samples[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _step(
    detector: Detector, micro_batches: list[list[Any]], counts: ObjectCounts | None
) -> tuple[dict[str, float], Gradients]:
    """Sum of each loss over the micro-batches, and the gradient of all."""
    detector.zero_grad()
    sums: dict[str, float] = {}
    for micro_batch in micro_batches:
        losses = detector(micro_batch, counts)
        torch.stack(list(losses.values())).sum().backward()
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in losses.items()}
    return sums, {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}


def _divisors(detector: Detector, micro_batches: list[list[Any]]) -> ObjectCounts:
    counts = sum(
        (detector.count_objects(micro_batch) for micro_batch in micro_batches), ObjectCounts()
    )
    return mean_over_ranks(counts, torch.device("cpu"))


@pytest.fixture
def in_float64(family) -> Detector:
    """Rounding must not hide a difference."""
    return family.double()


def _largest_difference(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    return max((found[n] - expected[n]).abs().max().item() for n in expected) / scale


def test_micro_batches_add_up_to_the_whole_batch(in_float64):
    """2x4 equals 8, and so do micro-batches of other sizes, for losses and gradients."""
    samples = _samples(OBJECTS)
    whole, expected = _step(in_float64, [samples], None)
    assert all(value > 0 for value in whole.values())
    for sizes in MICRO_BATCHES.values():
        micro_batches = _split(samples, sizes)
        losses, gradients = _step(in_float64, micro_batches, _divisors(in_float64, micro_batches))
        assert losses == pytest.approx(whole, rel=1e-11)
        assert _largest_difference(gradients, expected) < 1e-11


@pytest.mark.parametrize("family_config", ["dn_detr_r50"], indirect=True)
def test_micro_batches_that_count_for_themselves_do_not_add_up(in_float64):
    """The test above would notice."""
    samples = _samples(OBJECTS)
    whole, expected = _step(in_float64, [samples], None)
    losses, gradients = _step(in_float64, _split(samples, [4, 4]), None)
    assert losses["loss_bbox"] != pytest.approx(whole["loss_bbox"], rel=0.1)
    assert losses["loss_bbox_dn"] != pytest.approx(whole["loss_bbox_dn"], rel=0.1)
    assert _largest_difference(gradients, expected) > 0.1


def test_a_step_of_micro_batches_without_any_object_is_that_of_the_batch(in_float64):
    samples = _samples([0, 0, 0])
    whole, expected = _step(in_float64, [samples], None)
    micro_batches = _split(samples, [2, 1])
    divisors = _divisors(in_float64, micro_batches)
    assert (divisors.matching, divisors.denoising) == (1.0, 1.0)
    losses, gradients = _step(in_float64, micro_batches, divisors)
    assert losses == pytest.approx(whole, rel=1e-11)
    assert _largest_difference(gradients, expected) < 1e-11


def test_micro_batches_add_up_when_they_are_padded_otherwise(in_float64):
    samples = _samples([3, 1], width=64) + _samples([2, 4], width=96)
    whole, expected = _step(in_float64, [samples], None)
    micro_batches = _split(samples, [2, 2])
    losses, gradients = _step(in_float64, micro_batches, _divisors(in_float64, micro_batches))
    assert losses == pytest.approx(whole, rel=1e-5)  # positions of cells are float32
    assert _largest_difference(gradients, expected) < 1e-5


@pytest.mark.parametrize("family_config", ["dino_r50"], indirect=True)
def test_micro_batches_add_up_with_softmax_over_more_proposals_than_cells(family_config):
    """A mean over proposals is divided by those of the whole step."""
    family_config.classification = LazyCall(SoftmaxClassification)()
    family_config.num_queries = 90  # of 64 or 96 cells
    detector = away_from_initialisation(family_config).double()
    samples = _samples([3, 0], width=64) + _samples([2], width=96)
    micro_batches = _split(samples, [2, 1])
    whole, expected = _step(detector, [samples], None)
    losses, gradients = _step(detector, micro_batches, _divisors(detector, micro_batches))
    assert losses == pytest.approx(whole, rel=1e-5)
    assert _largest_difference(gradients, expected) < 1e-5


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objects", [[3, 1], [0, 0], [9, 2], [0, 5, 40]])
def test_the_noised_boxes_are_counted_before_they_are_drawn(objects, masked):
    denoising = QueryDenoising(5, max_queries=12, num_groups=3, mask_empty_slots=masked)
    targets = [{"labels": torch.zeros(n).long(), "boxes": torch.rand(n, 4)} for n in objects]
    assert denoising.num_noised(objects) == len(denoising.noise(targets).pairs)


@pytest.mark.parametrize("family_config", FAMILIES, indirect=True)
def test_counts_are_those_of_the_batch(family):
    counts = family.count_objects(_samples([3, 0, 40]))
    noised = 0
    if family.denoising is not None:  # contrastive: 200 queries for pairs of noised boxes
        noised = 33 * 3 + 2 * 40 if family.denoising.num_negatives else 5 * 3 + 5 * 40
    assert (counts.matching, counts.denoising) == (43, noised)


@pytest.mark.parametrize("family_config", ["dab_detr_r50"], indirect=True)
def test_a_sample_without_ground_truth_cannot_be_counted(family):
    sample = make_sample(8, 8, 0, 7)
    del sample["instances"]
    with pytest.raises(ValueError, match="image 7: training needs ground truth"):
        family.count_objects([sample])
