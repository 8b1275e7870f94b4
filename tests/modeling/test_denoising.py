"""Query denoising: what the noised queries are, who sees whom, and what they cost."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dn_detr.modeling import NoisedQueries, QueryDenoising
from dn_detr.modeling.denoising import Noise

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


def _noised(counts: list[int], seeds: list[int] | None = None, **options) -> NoisedQueries:
    denoising = QueryDenoising(CLASSES, DIM, **options)
    content, anchors = torch.randn(len(counts), QUERIES, DIM), torch.randn(len(counts), QUERIES, 4)
    return denoising(_targets(counts), content, anchors, seeds)


counts = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(1, 4), st.integers(1, 12), st.booleans())
def test_size_is_bounded_and_every_noised_box_has_its_own_slot(counts, groups, most, masked):
    noised = _noised(counts, num_groups=groups, max_queries=most, mask_empty_slots=masked)
    assert noised.content.shape == (len(counts), noised.num_slots + QUERIES, DIM)
    places = set(zip(noised.image.tolist(), noised.slot.tolist(), strict=True))
    assert len(places) == len(noised.slot)
    assert noised.num_slots <= (most if masked else max(most, max(counts)))
    for image, count in enumerate(counts):
        repeats = min(groups, max(1, most // max(count, 1)))
        if masked:
            assert (noised.image == image).sum() == min(count, most) * repeats


@settings(deadline=None, max_examples=60)
@given(counts, st.floats(0, 3))
def test_noised_boxes_lie_in_the_unit_square_with_sides_that_are_not_negative(counts, box_noise):
    denoising = QueryDenoising(CLASSES, DIM, box_noise=box_noise)
    boxes = torch.cat([target["boxes"] for target in _targets(counts)])
    noise = denoising.draw_noise(len(boxes), torch.Generator().manual_seed(0))
    one_group = Noise(noise.flip[0], noise.label[0], noise.box[0])
    _, noised = denoising._add_noise(torch.zeros(len(boxes), dtype=torch.long), boxes, one_group)
    assert ((noised >= 0) & (noised <= 1)).all()


def test_without_noise_the_queries_are_the_ground_truth():
    noised = _noised([3, 2], label_noise=0.0, box_noise=0.0)
    boxes = noised.anchors[noised.image, noised.slot].sigmoid()
    torch.testing.assert_close(boxes, noised.boxes.clamp(1e-3, 1 - 1e-3), atol=1e-5, rtol=0)


def test_label_noise_replaces_the_wanted_share():
    denoising = QueryDenoising(CLASSES, DIM, label_noise=0.3, num_groups=50)
    with torch.no_grad():  # rows that tell their label
        denoising.label_embed.weight.copy_(torch.arange(CLASSES + 1.0)[:, None].expand(-1, DIM - 1))
    noised = denoising(_targets([60]), torch.zeros(1, 1, DIM), torch.zeros(1, 1, 4))
    labels = noised.content[noised.image, noised.slot, 0].long()
    changed = (labels != noised.labels).float().mean().item()
    assert labels.max() < CLASSES
    assert changed == pytest.approx(0.3 * (1 - 1 / CLASSES), abs=0.05)


def test_box_noise_stays_within_its_reach():
    noised = _noised([50], box_noise=0.4, num_groups=10)
    boxes = noised.anchors[noised.image, noised.slot].sigmoid()
    reach = torch.cat([noised.boxes[:, 2:] / 2, noised.boxes[:, 2:]], dim=-1) * 0.4
    assert ((boxes - noised.boxes).abs() <= reach + 2e-3).all()


def test_nobody_outside_a_group_sees_its_boxes_and_nobody_sees_empty_slots():
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
    together = _noised([3, 5], seeds=[7, 8])
    alone = _noised([3], seeds=[7])
    mine = together.image == 0
    torch.testing.assert_close(
        together.anchors[0, together.slot[mine]], alone.anchors[0, alone.slot]
    )


def test_split_is_the_inverse_of_prepending():
    noised = _noised([2, 1])
    (dn_content, _), (content, anchors) = noised.split(noised.content, noised.anchors)
    assert dn_content.shape[1] == noised.num_slots
    torch.testing.assert_close(torch.cat([dn_content, content], 1), noised.content)
    assert anchors.shape == (2, QUERIES, 4)


def test_indicator_tells_noised_from_matching_queries():
    noised = _noised([2, 1])
    assert (noised.content[noised.image, noised.slot, -1] == 1).all()


def test_loss_of_a_perfect_reconstruction_is_zero():
    denoising = QueryDenoising(CLASSES, DIM)
    noised = denoising(_targets([2, 3]), torch.zeros(2, 1, DIM), torch.zeros(2, 1, 4))
    boxes = torch.full((1, 2, noised.num_slots, 4), 0.5)
    boxes[0, noised.image, noised.slot] = noised.boxes
    logits = torch.full((1, 2, noised.num_slots, CLASSES), -50.0)
    logits[0, noised.image, noised.slot, noised.labels] = 50.0
    losses = denoising.loss(logits, boxes, noised)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        {"loss_ce_dn": 0, "loss_bbox_dn": 0, "loss_giou_dn": 0}, abs=1e-3
    )


def test_weights_and_focal_parameters_reach_the_loss():
    def losses(**options):
        denoising = QueryDenoising(CLASSES, DIM, **options)
        noised = denoising(_targets([3]), torch.zeros(1, 1, DIM), torch.zeros(1, 1, 4), [0])
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(1, 1, noised.num_slots, CLASSES, generator=generator)
        return denoising.loss(logits, torch.full((1, 1, noised.num_slots, 4), 0.4), noised)

    plain = losses()
    heavy = losses(weights={"loss_ce": 3.0, "loss_bbox": 10.0, "loss_giou": 2.0})
    torch.testing.assert_close(heavy["loss_ce_dn"], 3 * plain["loss_ce_dn"])
    torch.testing.assert_close(heavy["loss_bbox_dn"], 2 * plain["loss_bbox_dn"])
    torch.testing.assert_close(heavy["loss_giou_dn"], plain["loss_giou_dn"])
    assert losses(alpha=0.5)["loss_ce_dn"] != plain["loss_ce_dn"]
    assert losses(gamma=0.0)["loss_ce_dn"] > plain["loss_ce_dn"]


def test_one_target_per_image_is_required():
    with pytest.raises(ValueError, match="1 targets for a batch of 2"):
        QueryDenoising(CLASSES, DIM)(_targets([3]), torch.zeros(2, 1, DIM), torch.zeros(2, 1, 4))


@pytest.mark.parametrize("weights", [{}, {"loss_ce": 1.0}, {"loss_cls": 1.0}])
def test_incomplete_weights_are_refused(weights):
    with pytest.raises(ValueError, match="loss weights"):
        QueryDenoising(CLASSES, DIM, weights=weights)


def test_more_objects_than_queries_are_a_random_choice_of_them():
    chosen = [
        tuple(_noised([9], seeds=[seed], max_queries=4, num_groups=1).boxes[:, 0].tolist())
        for seed in range(4)
    ]
    assert len(set(chosen)) > 1 and all(len(boxes) == 4 for boxes in chosen)


def test_without_objects_losses_are_zero_and_the_label_table_gets_a_gradient():
    denoising = QueryDenoising(CLASSES, DIM)
    noised = denoising(_targets([0, 0]), torch.zeros(2, 1, DIM), torch.zeros(2, 1, 4))
    assert noised.num_slots == 0
    (states,), _ = noised.split(noised.content)
    logits, boxes = states[None, ..., :CLASSES], states[None, ..., :4]
    total = torch.stack(list(denoising.loss(logits, boxes, noised).values())).sum()
    total.backward()
    assert total == 0
    assert denoising.label_embed.weight.grad is not None
    assert not denoising.label_embed.weight.grad.any()


@pytest.mark.parametrize(
    "options", [{"num_groups": 0}, {"max_queries": 0}, {"label_noise": 1.5}, {"box_noise": -1.0}]
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QueryDenoising(CLASSES, DIM, **options)


def test_documented_example_learns_in_fewer_than_100_lines():
    spec = importlib.util.spec_from_file_location("minimal_dn_detector", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.main(steps=30)
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    assert len(EXAMPLE.read_text().splitlines()) < 100
