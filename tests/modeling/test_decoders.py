"""The decoder loop, and attention that keeps content and position apart."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dn_detr.config import ConfigError, get_config, instantiate
from dn_detr.config import LazyCall as L
from dn_detr.layers import sine_embed_boxes
from dn_detr.modeling import (
    DeformableDecoder,
    DeformableEncoder,
    DenseDecoder,
    DenseEncoder,
    DetectionHeads,
    Memory,
)
from dn_detr.modeling.transformers import DeformableDecoderLayer, DenseDecoderLayer, Levels
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
    options = {"embed_dim": CHANNELS, "num_heads": HEADS, "feedforward_dim": 32, "num_levels": 1}
    if kind == "dense":
        return DenseDecoder(partial(DenseDecoderLayer, **options), 3, CHANNELS)
    return DeformableDecoder(partial(DeformableDecoderLayer, **options), 3, CHANNELS)


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
    outputs = heads(states, references)
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
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
    found, query = attention(x, pos)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(query, q)


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


def test_cross_attention_weights_levels_that_it_attends_to_one_by_one():
    attention = ConditionalCrossAttention(CHANNELS, HEADS, num_levels=2)
    memory = _memory((4, 6), (2, 3))
    x, pos, sine, query = (torch.randn(2, QUERIES, CHANNELS) for _ in range(4))
    weights = attention.level_attn(query).softmax(-1)
    expected = 0
    single = ConditionalCrossAttention(CHANNELS, HEADS)
    single.load_state_dict(attention.state_dict(), strict=False)
    for level, (cells, shape) in enumerate([(slice(0, 24), (4, 6)), (slice(24, 30), (2, 3))]):
        levels = Levels.from_masks([torch.zeros(2, *shape, dtype=torch.bool)])
        alone = Memory(memory.cells[:, cells], memory.pos[:, cells], levels)
        expected = expected + weights[..., level, None] * single(x, pos, sine, alone, query)
    torch.testing.assert_close(attention(x, pos, sine, memory, query), expected)


def test_levels_are_weighted_by_the_projected_queries_of_the_self_attention():
    """As published: not by the states that the self-attention returned."""
    layer = partial(DenseDecoderLayer, CHANNELS, HEADS, num_levels=2)
    decoder = DenseDecoder(layer, 2, CHANNELS)
    projected, used = [], []
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, output: projected.append(output[1]))
        layer.cross_attn.level_attn.register_forward_pre_hook(lambda _m, i: used.append(i[0]))
    inputs = torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, 4)
    decoder(*inputs, _memory((4, 6), (2, 3)), DetectionHeads(3, CHANNELS, shared=True))
    assert len(projected) == 2 and all(p is u for p, u in zip(projected, used, strict=True))


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
    layer = partial(DeformableDecoderLayer, CHANNELS, HEADS, num_levels=2)
    decoder = DeformableDecoder(layer, 2, CHANNELS, padded_query_pos=padded_query_pos)
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


class _OwnLayer(DeformableDecoderLayer):
    """A layer of a project, with a module among its arguments."""

    def __init__(self, mixer: torch.nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.mixer = mixer

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return super().forward(self.mixer(x), *inputs)


def test_layers_do_not_share_the_modules_of_their_arguments():
    layer = partial(_OwnLayer, torch.nn.Linear(CHANNELS, CHANNELS), embed_dim=CHANNELS)
    first, second = DeformableDecoder(layer, 2, CHANNELS).layers
    assert first.mixer.weight is not second.mixer.weight


@pytest.mark.parametrize("stack", [DenseEncoder, DenseDecoder, DeformableEncoder])
def test_one_layer_for_all_is_refused(stack):
    with pytest.raises(ValueError, match=r"layer is one Linear for all layers.*_partial_=True"):
        stack(torch.nn.Linear(2, 2))


def test_a_stack_without_layers_is_refused():
    with pytest.raises(ValueError, match="num_layers 0 must be at least 1"):
        DeformableEncoder(num_layers=0)


def test_a_config_names_the_nearest_argument_of_a_layer():
    cfg = get_config("models/dab_deformable_detr_r50.py").model
    cfg.transformer.decoder.layer.num_point = 4
    with pytest.raises(ConfigError, match=r"num_point.*did you mean.*num_points"):
        instantiate(cfg)


def test_a_config_makes_a_decoder_of_own_layers_as_dino_has_it():
    """States are normalised, losses reach the box before, no parameter is unused."""
    cfg = get_config("models/dab_deformable_detr_r50.py").model.transformer
    cfg.embed_dim = cfg.encoder.layer.embed_dim = CHANNELS
    decoder = cfg.decoder
    decoder.update(num_layers=2, embed_dim=CHANNELS, final_norm=True)
    decoder.update(look_forward_twice=True, query_scale=False)
    layer = dict(_target_=_OwnLayer, mixer=L(torch.nn.Linear)(in_features=16, out_features=16))
    decoder.layer.update(embed_dim=CHANNELS, num_levels=2, **layer)
    built = instantiate(decoder)
    names = {name.partition(".")[0] for name, _ in built.named_parameters()}
    assert names == {"layers", "ref_point_head", "norm"}
    heads = DetectionHeads(3, CHANNELS, num_layers=2)
    torch.nn.init.normal_(heads.bbox_embed[0].layers[-1].weight)
    torch.nn.init.normal_(heads.bbox_embed[1].layers[-1].weight)
    inputs = torch.randn(2, QUERIES, CHANNELS), torch.randn(2, QUERIES, 4)
    states, references = built(*inputs, _memory((4, 6), (2, 3)), heads)
    assert references.requires_grad
    outputs = heads(states, references)
    (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()).backward()
    parameters = [*built.named_parameters(), *heads.named_parameters()]
    assert [name for name, p in parameters if p.grad is None] == []
