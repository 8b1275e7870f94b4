"""Query denoising: what the noised queries are, who sees whom, and what they cost."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dn_detr.modeling import (
    BoxQueryEmbedding,
    DetectionCriterion,
    NoisedBoxes,
    NoisedQueries,
    QueryDenoising,
)

QUERIES, DIM, CLASSES = 4, 8, 5
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal_dn_detector.py"


def _targets(counts: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "labels": torch.randint(CLASSES, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator),
        }
        for n in counts
    ]


def _denoising(**options) -> QueryDenoising:
    return QueryDenoising(CLASSES, BoxQueryEmbedding(CLASSES, DIM), **options)


def _noised(counts: list[int], seeds: list[int] | None = None, **options) -> NoisedQueries:
    content, anchors = torch.randn(len(counts), QUERIES, DIM), torch.randn(len(counts), QUERIES, 4)
    return _denoising(**options)(_targets(counts), content, anchors, seeds)


def _boxes(counts: list[int], seeds: list[int] | None = None, **options) -> NoisedBoxes:
    return QueryDenoising(CLASSES, **options).noise(_targets(counts), seeds)


counts = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_size_is_bounded_and_every_noised_box_has_its_own_slot(counts, groups, most, masked):
    options = {"num_groups": groups, "max_queries": most, "mask_empty_slots": masked}
    queries, noised = _noised(counts, **options), _boxes(counts, **options)
    assert queries.content.shape == (len(counts), queries.num_slots + QUERIES, DIM)
    places = set(zip(noised.image.tolist(), noised.slot.tolist(), strict=True))
    assert len(places) == len(noised.slot)
    assert queries.num_slots <= (most if masked else max(most, max(counts)))
    for image, count in enumerate(counts):
        repeats = min(groups, max(1, most // max(count, 1)))
        if masked:
            assert (noised.image == image).sum() == min(count, most) * repeats


@settings(deadline=None, max_examples=60)
@given(counts, st.floats(0, 3))
def test_noised_boxes_lie_in_the_unit_square_with_sides_that_are_not_negative(counts, box_noise):
    boxes = _boxes(counts, box_noise=box_noise).boxes
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_without_noise_the_queries_are_the_ground_truth():
    options = {"label_noise": 0.0, "box_noise": 0.0}
    queries, noised = _noised([3, 2], **options), _boxes([3, 2], **options)
    true = noised.pairs.objects(_targets([3, 2]), "boxes")[0]
    assert torch.equal(noised.boxes, true)
    boxes = queries.position[noised.image, noised.slot].sigmoid()
    torch.testing.assert_close(boxes, true.clamp(1e-3, 1 - 1e-3), atol=1e-5, rtol=0)


def test_label_noise_replaces_the_wanted_share():
    noised = _boxes([60], label_noise=0.3, num_groups=50)
    changed = noised.labels != noised.pairs.objects(_targets([60]), "labels")[0]
    assert noised.labels.max() < CLASSES
    assert changed.float().mean().item() == pytest.approx(0.3 * (1 - 1 / CLASSES), abs=0.05)


def test_box_noise_stays_within_its_reach():
    noised = _boxes([50], box_noise=0.4, num_groups=10)
    true = noised.pairs.objects(_targets([50]), "boxes")[0]
    reach = torch.cat([true[:, 2:] / 2, true[:, 2:]], dim=-1) * 0.4
    assert ((noised.boxes - true).abs() <= reach + 1e-6).all()


def test_noised_labels_and_boxes_become_content_and_position():
    denoising, targets = _denoising(), _targets([3])
    queries = denoising(targets, torch.zeros(1, 1, DIM), torch.zeros(1, 1, 4), [7])
    noised = denoising.noise(targets, [7])
    content, position = denoising.embed(noised.labels, noised.boxes, noised.group)
    assert torch.equal(queries.content[0, noised.slot], content)
    assert torch.equal(queries.position[0, noised.slot], position)
    assert torch.equal(content[:, :-1], denoising.embed.label_embed.weight[noised.labels])


def test_groups_are_hidden_from_other_queries_and_empty_slots_from_all():
    noised = _noised([3, 1], num_groups=2)
    sees = ~noised.attention_mask
    slots = noised.num_slots
    assert slots == 6
    # image 0: two groups of three boxes
    for group in (slice(0, 3), slice(3, 6)):
        expected = torch.zeros(slots, dtype=torch.bool)
        expected[group] = True
        assert (sees[0, group, :slots] == expected).all()
    # image 1: two groups of one box, four empty slots
    assert torch.equal(sees[1, :2, :slots], torch.eye(2, slots, dtype=torch.bool))
    assert not sees[1, 2:slots, :slots].any()
    # matching queries see matching queries only, denoising queries see them as well
    assert not sees[:, slots:, :slots].any() and sees[:, :, slots:].all()


def test_noise_of_an_image_depends_on_its_own_seed_only():
    together, alone = _boxes([3, 5], seeds=[7, 8]), _boxes([3], seeds=[7])
    mine = together.image == 0
    assert torch.equal(together.boxes[mine], alone.boxes)
    assert torch.equal(together.labels[mine], alone.labels)


def test_split_is_the_inverse_of_prepending():
    noised = _noised([2, 1])
    outputs = {"content": noised.content[None], "position": noised.position[None]}
    denoising, matching = noised.split(outputs)
    assert denoising["content"].shape[2] == noised.num_slots
    joint = torch.cat([denoising["content"], matching["content"]], 2)
    torch.testing.assert_close(joint, outputs["content"])
    assert matching["position"].shape == (1, 2, QUERIES, 4)


def test_indicator_tells_noised_from_matching_queries():
    noised = _noised([2, 1])
    assert (noised.content[noised.pairs.image, noised.pairs.query[0], -1] == 1).all()


def test_loss_of_a_perfect_reconstruction_is_zero():
    targets = _targets([2, 3])
    noised = _denoising()(targets, torch.zeros(2, 1, DIM), torch.zeros(2, 1, 4))
    image, slot = noised.pairs.image, noised.pairs.query[0]
    boxes = torch.full((1, 2, noised.num_slots, 4), 0.5)
    boxes[0, image, slot] = noised.pairs.objects(targets, "boxes")[0]
    logits = torch.full((1, 2, noised.num_slots, CLASSES), -50.0)
    logits[0, image, slot, noised.pairs.objects(targets, "labels")[0]] = 50.0
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    losses = DetectionCriterion()(outputs, targets, noised.pairs, count=1, suffix="_dn")
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {"loss_ce_dn": 0, "loss_bbox_dn": 0, "loss_giou_dn": 0}, abs=1e-3
    )


def test_empty_slots_are_not_classified():
    noised = _noised([3, 1], num_groups=2)
    image, slot = noised.pairs.classified
    assert noised.num_slots == 6 and image.tolist() == [0] * 6 + [1] * 2
    assert slot.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_one_target_per_image_is_required():
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        _denoising()(_targets([3]), torch.zeros(2, 1, DIM), torch.zeros(2, 1, 4))


def test_more_objects_than_queries_are_a_random_choice_of_them():
    chosen = [
        tuple(_boxes([9], seeds=[seed], max_queries=4, num_groups=1).pairs.target[0].tolist())
        for seed in range(4)
    ]
    assert len(set(chosen)) > 1 and all(len(set(objects)) == 4 for objects in chosen)


def test_without_objects_losses_are_zero_and_the_label_table_gets_a_gradient():
    denoising, targets = _denoising(), _targets([0, 0])
    noised = denoising(targets, torch.zeros(2, 1, DIM), torch.zeros(2, 1, 4))
    assert noised.num_slots == 0
    states = noised.content[None]
    outputs, _ = noised.split({"pred_logits": states[..., :CLASSES], "pred_boxes": states[..., :4]})
    losses = DetectionCriterion()(outputs, targets, noised.pairs, count=1)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total == 0
    assert denoising.embed.label_embed.weight.grad is not None
    assert not denoising.embed.label_embed.weight.grad.any()


@pytest.mark.parametrize(
    "options", [{"num_groups": 0}, {"max_queries": 0}, {"label_noise": 1.5}, {"box_noise": -1.0}]
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QueryDenoising(CLASSES, **options)


def test_documented_example_learns_in_fewer_than_100_lines():
    spec = importlib.util.spec_from_file_location("minimal_dn_detector", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.main(steps=30)
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    assert len(EXAMPLE.read_text().splitlines()) < 100
