"""The decoder loop, and attention that keeps content and position apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dn_detr.layers import sine_embed_boxes
from dn_detr.modeling import DeformableDecoder, DenseDecoder, DetectionHeads, Memory
from dn_detr.modeling.transformers import Levels
from dn_detr.modeling.transformers.conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
)
from dn_detr.structures import inverse_sigmoid

CHANNELS, HEADS, QUERIES = 16, 4, 5


def _memory(*shapes: tuple[int, int], batch: int = 2) -> Memory:
    levels = Levels.from_masks([torch.zeros(batch, *shape, dtype=torch.bool) for shape in shapes])
    cells = torch.randn(batch, sum(levels.sizes), CHANNELS)
    return Memory(cells, torch.randn_like(cells), levels)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _decoder(kind: str) -> torch.nn.Module:
    options = {"num_layers": 3, "embed_dim": CHANNELS, "num_heads": HEADS, "feedforward_dim": 32}
    if kind == "dense":
        return DenseDecoder(**options)
    return DeformableDecoder(**options, num_levels=1)


@pytest.mark.parametrize(("kind", "learns"), [("dense", True), ("deformable", False)])
def test_only_dense_references_carry_gradient_to_the_move_before(kind, learns):
    heads = DetectionHeads(3, CHANNELS, num_layers=3)
    _, references = _decoder(kind)(
        torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, 4), _memory((4, 6)), heads
    )
    assert references.requires_grad == learns


def test_first_reference_is_the_anchor_and_later_ones_are_moved():
    heads = DetectionHeads(3, CHANNELS, num_layers=3)
    anchors = torch.randn(2, QUERIES, 4)
    torch.nn.init.normal_(heads.bbox_embed[0].layers[-1].weight)
    _, references = _decoder("dense")(
        torch.randn(2, QUERIES, CHANNELS), anchors, _memory((4, 6)), heads
    )
    torch.testing.assert_close(references[0], anchors.sigmoid())
    assert not torch.allclose(references[1], references[0])


def test_dense_states_are_normalised_and_boxes_move_by_the_states_before():
    decoder, heads = _decoder("dense"), DetectionHeads(3, CHANNELS, shared=True)
    torch.nn.init.normal_(heads.bbox_embed[0].layers[-1].weight)
    inputs = torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, 4), _memory((4, 6))
    states, references = decoder(*inputs, heads)
    torch.nn.init.constant_(decoder.norm.weight, 3.0)
    scaled, same_references = decoder(*inputs, heads)
    torch.testing.assert_close(scaled, 3 * states)
    torch.testing.assert_close(same_references, references, rtol=0, atol=0)


def test_shared_heads_are_one_head():
    heads = DetectionHeads(3, CHANNELS, num_layers=6, shared=True)
    assert len(heads.class_embed) == len(heads.bbox_embed) == 1
    states, references = torch.randn(6, 2, QUERIES, CHANNELS), torch.rand(6, 2, QUERIES, 4)
    logits, boxes = heads(states, references)
    torch.testing.assert_close(logits[4], heads.class_embed[0](states[4]))
    torch.testing.assert_close(boxes[4], heads.predict_boxes(0, states[4], references[4]))


def test_self_attention_is_softmax_of_summed_content_and_position():
    attention = ConditionalSelfAttention(CHANNELS, HEADS)
    x, pos = torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, CHANNELS)
    q = attention.query_content_proj(x) + attention.query_pos_proj(pos)
    k = attention.key_content_proj(x) + attention.key_pos_proj(pos)
    v = attention.value_proj(x)
    width = CHANNELS // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    found, asked = attention(x, pos)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(asked, q)


@pytest.mark.parametrize("adds_position", [True, False])
def test_cross_attention_compares_content_and_position_side_by_side(adds_position):
    attention = ConditionalCrossAttention(CHANNELS, HEADS, adds_position=adds_position)
    memory = _memory((4, 6))
    x, pos, sine = (torch.randn(2, QUERIES, CHANNELS) for _ in range(3))
    q, k = attention.query_content_proj(x), attention.key_content_proj(memory.cells)
    k_pos, v = attention.key_pos_proj(memory.pos), attention.value_proj(memory.cells)
    if adds_position:
        q, k = q + attention.query_pos_proj(pos), k + k_pos
    q_pos = attention.query_pos_sine_proj(sine)
    width = CHANNELS // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        logits = q[..., part] @ k[..., part].transpose(1, 2)
        logits = logits + q_pos[..., part] @ k_pos[..., part].transpose(1, 2)
        heads.append((logits / (2 * width) ** 0.5).softmax(-1) @ v[..., part])
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, pos, sine, memory, x), expected)


def test_cross_attention_weighs_levels_that_it_attends_to_one_by_one():
    attention = ConditionalCrossAttention(CHANNELS, HEADS, num_levels=2)
    memory = _memory((4, 6), (2, 3))
    x, pos, sine, asked = (torch.randn(2, QUERIES, CHANNELS) for _ in range(4))
    weights = attention.level_attn(asked).softmax(-1)
    expected = 0
    single = ConditionalCrossAttention(CHANNELS, HEADS)
    single.load_state_dict(attention.state_dict(), strict=False)
    for level, (cells, shape) in enumerate([(slice(0, 24), (4, 6)), (slice(24, 30), (2, 3))]):
        levels = Levels.from_masks([torch.zeros(2, *shape, dtype=torch.bool)])
        alone = Memory(memory.cells[:, cells], memory.pos[:, cells], levels)
        expected = expected + weights[..., level, None] * single(x, pos, sine, alone, asked)
    torch.testing.assert_close(attention(x, pos, sine, memory, asked), expected)


def test_levels_are_weighed_by_the_queries_that_the_self_attention_asked_with():
    """As published: not by the states that the self-attention returned."""
    options = {"num_layers": 2, "embed_dim": CHANNELS, "num_heads": HEADS, "feedforward_dim": 32}
    decoder = DenseDecoder(num_levels=2, **options)
    asked, weighed = [], []
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, output: asked.append(output[1]))
        layer.cross_attn.level_attn.register_forward_pre_hook(lambda _m, i: weighed.append(i[0]))
    inputs = torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, 4)
    decoder(*inputs, _memory((4, 6), (2, 3)), DetectionHeads(3, CHANNELS, shared=True))
    assert len(asked) == 2 and all(a is w for a, w in zip(asked, weighed, strict=True))


def test_modulation_is_computed_in_float32_under_autocast():
    decoder = _decoder("dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder._modulation(torch.randn(2, QUERIES, CHANNELS), torch.rand(2, QUERIES, 4))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("padded_query_pos", [False, True])
def test_deformable_decoder_is_the_published_one_step_by_step(padded_query_pos):
    """Positions are scaled by the content from the second layer on; no norm at the end."""
    memory = _memory((4, 6), (2, 3))
    ratios = torch.tensor([[[0.5, 0.9], [0.6, 0.8]], [[1.0, 0.7], [0.3, 1.0]]])
    memory = replace(memory, levels=replace(memory.levels, valid_ratios=ratios))
    decoder = DeformableDecoder(
        2, CHANNELS, padded_query_pos=padded_query_pos, num_heads=HEADS, num_levels=2
    )
    heads = DetectionHeads(3, CHANNELS, num_layers=2)
    for parameter in [*decoder.parameters(), *heads.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    content, anchors = torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, 4)
    states, references = decoder(content, anchors, memory, heads)
    x, box = content, anchors.sigmoid()
    for index, layer in enumerate(decoder.layers):
        torch.testing.assert_close(references[index], box)
        levels = memory.levels
        padded = box[:, :, None] * torch.cat([ratios, ratios], dim=-1)[:, None]
        embedded = padded[:, :, 0] if padded_query_pos else box
        pos = decoder.ref_point_head(sine_embed_boxes(embedded, CHANNELS // 2))
        pos = pos if index == 0 else pos * decoder.query_scale(x)
        x = layer.self_norm(x + layer.self_attn(x + pos, x + pos, x))
        shapes = (levels.spatial_shapes, levels.level_start_index, levels.padding_mask)
        x = layer.cross_norm(x + layer.cross_attn(x + pos, padded, memory.cells, *shapes))
        x = layer.ffn(x)
        torch.testing.assert_close(states[index], x)
        box = (heads.bbox_embed[index](x) + inverse_sigmoid(box)).sigmoid()


@pytest.mark.parametrize("shapes", [[(4, 6)], [(4, 6), (2, 3)]], ids=["one level", "two levels"])
def test_cross_attention_does_not_see_padding(shapes):
    attention = ConditionalCrossAttention(CHANNELS, HEADS, num_levels=len(shapes))
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in shapes]
    for mask in masks:
        mask[:, :, mask.shape[2] // 2 :] = True
    memory = replace(_memory(*shapes), levels=Levels.from_masks(masks))
    x, pos, sine = (torch.randn(2, QUERIES, CHANNELS) for _ in range(3))
    before = attention(x, pos, sine, memory, x)
    padding = memory.levels.padding_mask
    memory.cells[padding], memory.pos[padding] = 9.0, -9.0
    torch.testing.assert_close(attention(x, pos, sine, memory, x), before)
