"""Matching queries: learned ones with patterns, and proposals of the encoder."""

from __future__ import annotations

import math

import pytest
import torch

from dn_detr.modeling import (
    AnchorQueries,
    BoxQueryEmbedding,
    DetectionHeads,
    Memory,
    ProposalQueries,
    SoftmaxClassification,
)
from dn_detr.modeling.transformers import Levels

CHANNELS = 8


def _memory(*masks: torch.Tensor, seed: int = 0) -> Memory:
    levels = Levels.from_masks(masks)
    generator = torch.Generator().manual_seed(seed)
    batch, cells = levels.padding_mask.shape
    values = torch.randn(batch, cells, CHANNELS, generator=generator)
    return Memory(values, torch.zeros_like(values), levels)


def _unpadded(batch: int = 1, height: int = 6, width: int = 8) -> Memory:
    return _memory(torch.zeros(batch, height, width, dtype=torch.bool))


def test_patterns_are_added_to_copies_of_all_queries_pattern_after_pattern():
    queries = AnchorQueries(5, CHANNELS, content="shared", num_patterns=3)
    found = queries(_unpadded(batch=2))
    assert found.content.shape == (2, 15, CHANNELS) and found.position.shape == (2, 15, 4)
    content = torch.cat([queries.content.weight[0], torch.zeros(1)])
    for pattern in range(3):
        copy = slice(5 * pattern, 5 * pattern + 5)
        expected = (queries.patterns.weight[pattern] + content).expand(5, -1)
        torch.testing.assert_close(found.content[1, copy], expected)
        torch.testing.assert_close(found.position[1, copy], queries.anchors.weight)


@pytest.mark.parametrize(
    ("kind", "rows"), [("per_query", 5), ("shared", 1), ("zero", 0)], ids=lambda x: str(x)
)
def test_contents_are_learned_per_query_shared_or_absent(kind, rows):
    queries = AnchorQueries(5, CHANNELS, content=kind, indicator=False)
    assert (
        sum(p.numel() for n, p in queries.named_parameters() if "content" in n) == rows * CHANNELS
    )
    content = queries(_unpadded()).content[0]
    assert len(content.unique(dim=0)) == max(rows, 1)
    assert (content == 0).all() == (kind == "zero")


def test_indicator_channel_of_matching_queries_is_zero():
    content = AnchorQueries(5, CHANNELS)(_unpadded()).content
    assert (content[..., -1] == 0).all() and (content[..., :-1] != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 0}, "num_queries 0"),
        ({"num_patterns": -1}, "num_patterns -1"),
        ({"content": "mine"}, r"'mine'.*'per_query', 'shared', 'zero'"),
        ({"position_kind": "line"}, r"'line'.*'box', 'point', 'vector'"),
    ],
)
def test_impossible_queries_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AnchorQueries(**options)


def test_a_mean_over_cells_whose_number_is_not_known_is_refused():
    with pytest.raises(ValueError, match="take FocalClassification"):
        ProposalQueries(5, 3, class_agnostic=True, classification=SoftmaxClassification())


@pytest.fixture
def proposing() -> ProposalQueries:
    torch.manual_seed(0)
    queries = ProposalQueries(10, num_classes=3, embed_dim=CHANNELS)
    torch.nn.init.normal_(queries.bbox_embed.layers[-1].weight)
    return queries


def _ranked(proposing: ProposalQueries, memory: Memory) -> dict[str, torch.Tensor]:
    """Outputs (S, ...) of all cells of the first image, best first."""
    proposing.num_queries = memory.cells.shape[1]
    proposals = proposing(memory).proposals
    assert proposals is not None
    return {name: output[0, 0] for name, output in proposals.outputs.items()}


def test_queries_are_the_cells_with_the_highest_class_logit(proposing):
    found = proposing(_unpadded())
    ranked = _ranked(proposing, _unpadded())
    assert (ranked["pred_logits"].amax(-1).diff() <= 0).all()
    torch.testing.assert_close(found.position[0].sigmoid(), ranked["pred_boxes"][:10])
    logits = found.proposals.outputs["pred_logits"]
    torch.testing.assert_close(logits[0, 0], ranked["pred_logits"][:10])


def test_proposals_start_from_squares_around_their_cell(proposing):
    torch.nn.init.zeros_(proposing.bbox_embed.layers[-1].weight)
    coarse, fine = torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    boxes = _ranked(proposing, _memory(fine, coarse))["pred_boxes"]
    for square in ([2.5 / 8, 3.5 / 8, 0.05, 0.05], [3.5 / 4, 1.5 / 4, 0.1, 0.1]):
        distance = (boxes - torch.tensor(square)).abs().amax(-1)
        assert (distance < 1e-6).sum() == 1


def test_cells_at_the_very_border_propose_the_whole_image(proposing):
    boxes = _ranked(proposing, _unpadded(height=60, width=60))["pred_boxes"]
    whole = (boxes == 1).all(-1)
    assert whole.sum() == 60 * 60 - 58 * 58 and (boxes[~whole] < 1).all()


def test_queries_carry_no_gradient_and_proposals_do(proposing):
    found = proposing(_unpadded())
    assert not found.content.requires_grad and not found.position.requires_grad
    assert all(output.requires_grad for output in found.proposals.outputs.values())


def test_padding_is_never_proposed_and_changes_nothing(proposing):
    alone = _unpadded(height=6, width=8)
    mask = torch.ones(1, 9, 12, dtype=torch.bool)
    mask[:, :6, :8] = False
    padded = _memory(mask, seed=1)
    padded.cells[~mask.flatten(1)] = alone.cells[0]
    expected, found = proposing(alone), proposing(padded)
    torch.testing.assert_close(found.position, expected.position)
    torch.testing.assert_close(found.content, expected.content)
    assert not found.proposals.padding.any()


def test_an_image_with_fewer_cells_than_queries_gets_empty_proposals(proposing):
    found = proposing(_unpadded(height=2, width=3))
    assert found.position.shape == (1, 10, 4) and found.proposals.padding.sum() == 4
    assert (found.position[:, 6:].sigmoid() > 0.99).all()


def test_contents_are_projected_then_normalised_cells_empty_at_the_border(proposing):
    torch.nn.init.normal_(proposing.output.bias)
    memory = _unpadded(height=60, width=60)
    usable = torch.ones(60, 60)
    usable[0], usable[-1], usable[:, 0], usable[:, -1] = 0, 0, 0, 0  # centres within 0.01
    cells = memory.cells[0] * usable.flatten()[:, None]
    features = proposing.norm(proposing.output(cells))
    best = proposing.class_embed(features).amax(-1).topk(10).indices
    torch.testing.assert_close(proposing(memory).content[0], features[best])


def test_the_projection_starts_from_xavier():
    weight = ProposalQueries(1, num_classes=3, embed_dim=64).output.weight
    assert weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.02)


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_eps_bounds_the_logits_of_noised_boxes_and_of_references(eps):
    labels, edge = torch.zeros(1, dtype=torch.long), torch.zeros(1, 4)
    _, position = BoxQueryEmbedding(3, CHANNELS, eps=eps)(labels, edge, labels)
    assert position[0].tolist() == pytest.approx([math.log(eps)] * 4, rel=1e-3)
    heads = DetectionHeads(3, CHANNELS, 1, eps=eps)
    boxes = heads.predict_boxes(0, torch.zeros(1, CHANNELS), edge)
    assert boxes[0].tolist() == pytest.approx([eps] * 4, rel=2e-3)
