"""Layers against torch's own modules and direct formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dn_detr.layers import (
    MLP,
    FeedForward,
    MaskedGroupNorm,
    MSDeformAttn,
    MultiheadAttention,
    PositionEmbeddingSine,
    sine_embed_boxes,
)
from dn_detr.structures import pad_images


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_mlp_has_no_activation_after_its_last_layer():
    mlp = MLP(4, 8, 3, 2)
    x = torch.randn(5, 4)
    expected = mlp.layers[1](mlp.layers[0](x).clamp(min=0))
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize(
    ("activation", "negative_half", "parameters"), [("relu", 0.0, 0), ("prelu", 0.25, 1)]
)
def test_feed_forward_applies_its_activation(activation, negative_half, parameters):
    ffn = FeedForward(4, 8, activation=activation)
    x = torch.randn(5, 4)
    hidden = ffn.linear1(x)
    bent = torch.where(hidden > 0, hidden, negative_half * hidden)
    torch.testing.assert_close(ffn(x), ffn.norm(x + ffn.linear2(bent)))
    assert sum(p.numel() for p in ffn.activation.parameters()) == parameters


def test_feed_forward_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="'swish'"):
        FeedForward(4, 8, activation="swish")


@pytest.mark.parametrize("per_image", [False, True])
def test_attention_is_torchs_attention(per_image):
    ours = MultiheadAttention(16, 4)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = (torch.randn(2, n, 16) for n in (5, 7, 7))
    mask = torch.rand(2, 5, 7) < 0.4
    mask[..., 0] = False
    mask = mask if per_image else mask[0]
    for_torch = mask.repeat_interleave(4, 0) if per_image else mask
    expected, _ = theirs(query, key, value, attn_mask=for_torch)
    torch.testing.assert_close(ours(query, key, value, mask=mask), expected)


def test_masked_group_norm_of_a_padded_batch_is_group_norm_of_each_image():
    norm = MaskedGroupNorm(4, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    images = [torch.randn(16, 5, 6), torch.randn(16, 3, 9)]
    batch, mask = pad_images(images)
    batch[mask[:, None].expand_as(batch)] = 100.0  # what lies in the padding must not matter
    out = norm(batch, mask)
    for row, image in enumerate(images):
        _, h, w = image.shape
        alone = nn.functional.group_norm(image[None], 4, norm.weight, norm.bias, norm.eps)[0]
        torch.testing.assert_close(out[row, :, :h, :w], alone)


def test_position_embedding_is_the_formula():
    embedding = PositionEmbeddingSine(4, temperature=100.0, offset=-0.5)
    _, mask = pad_images([torch.zeros(1, 3, 4), torch.zeros(1, 5, 6)])
    out = embedding(mask)[0, :, 1, 2]  # row 1 of 3, column 2 of 4
    y, x = (1 + 0.5) / 3 * 2 * math.pi, (2 + 0.5) / 4 * 2 * math.pi
    expected = [f(axis / t) for axis in (y, x) for t in (1, 10) for f in (math.sin, math.cos)]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_position_embedding_of_an_image_does_not_depend_on_padding():
    embedding = PositionEmbeddingSine(8, offset=-0.5)
    alone = embedding(torch.zeros(1, 3, 4, dtype=torch.bool))
    _, mask = pad_images([torch.zeros(1, 3, 4), torch.zeros(1, 9, 9)])
    torch.testing.assert_close(embedding(mask)[:1, :, :3, :4], alone)


def test_box_embedding_has_y_before_x():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    parts = sine_embed_boxes(box, 2).unflatten(-1, (4, 2))[:, 0]  # the sine of each coordinate
    expected = (torch.tensor([0.2, 0.1, 0.3, 0.4]) * 2 * math.pi).sin()
    torch.testing.assert_close(parts, expected)


def test_fresh_deformable_attention_looks_in_eight_directions():
    attention = MSDeformAttn(32, 8, 2, 3)
    grid = attention.sampling_offsets.bias.detach().unflatten(0, (8, 2, 3, 2))
    assert grid.abs().amax(-1).unique().tolist() == pytest.approx([1, 2, 3])
    angle = torch.atan2(grid[:, 0, 0, 1], grid[:, 0, 0, 0]) % (2 * math.pi)
    torch.testing.assert_close(angle, torch.arange(8) * math.pi / 4, atol=1e-4, rtol=0)


def test_deformable_attention_ignores_what_lies_in_the_padding():
    attention = MSDeformAttn(16, 2, 1, 4)
    nn.init.normal_(attention.sampling_offsets.weight)
    shapes, starts = torch.tensor([[4, 4]]), torch.tensor([0])
    query, references = torch.randn(1, 6, 16), torch.rand(1, 6, 1, 2)
    memory, mask = torch.randn(1, 16, 16), torch.rand(1, 16) < 0.5
    changed = torch.where(mask[..., None], 100.0, memory)
    out = attention(query, references, memory, shapes, starts, mask)
    torch.testing.assert_close(attention(query, references, changed, shapes, starts, mask), out)


def test_offsets_from_a_box_are_in_half_box_sizes():
    attention = MSDeformAttn(16, 2, 1, 4)
    nn.init.ones_(attention.sampling_offsets.bias)
    box = torch.tensor([0.5, 0.5, 0.2, 0.4]).view(1, 1, 1, 4)
    moved = torch.tensor([0.5 + 0.2 / 8, 0.5 + 0.4 / 8]).view(1, 1, 1, 2)
    query, memory = torch.randn(1, 1, 16), torch.randn(1, 20, 16)
    levels = (torch.tensor([[4, 5]]), torch.tensor([0]))
    out = attention(query, box, memory, *levels)
    nn.init.zeros_(attention.sampling_offsets.bias)
    torch.testing.assert_close(out, attention(query, moved, memory, *levels))


def test_reference_points_of_three_coordinates_are_refused():
    attention = MSDeformAttn(16, 2, 1, 4)
    with pytest.raises(ValueError, match="3 coordinates"):
        attention(
            torch.zeros(1, 1, 16),
            torch.zeros(1, 1, 1, 3),
            torch.zeros(1, 4, 16),
            torch.tensor([[2, 2]]),
            torch.tensor([0]),
        )
