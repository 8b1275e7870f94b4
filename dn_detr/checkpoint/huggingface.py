"""The layout of Hugging Face transformers: DabDetr and DeformableDetr, of any version.

Published files have the names of the version that wrote them; ``_NORMALISED`` brings them to one
spelling. A packed projection of query, key and value is stored as three tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from .architecture import Traits
from .key_rules import KeyRules

_RESNET = [  # a ResNet of transformers, not of timm
    (r"^(backbone\.body\.)embedder\.embedder\.convolution\.", r"\1conv1."),
    (r"^(backbone\.body\.)embedder\.embedder\.normalization\.", r"\1bn1."),
    (r"^(backbone\.body\.)encoder\.stages\.(\d+)\.layers\.", r"\1stage\2."),
    (r"(\.stage\d+\.\d+)\.layer\.(\d)\.convolution\.", r"\1.conv\2~."),
    (r"(\.stage\d+\.\d+)\.layer\.(\d)\.normalization\.", r"\1.bn\2~."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.stage{i}\.", f".layer{i + 1}.") for i in range(4)),
    *((rf"\.(conv|bn){i}~\.", rf".\g<1>{i + 1}.") for i in range(3)),
]
_NORMALISED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^model\.", ""),
        (r"^backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone.body."),
        *_RESNET,
        (r"^(decoder\.layers\.\d+\.)layer\.0\.self_attn\.", r"\1self_attn.self_attn."),
        (r"^(decoder\.layers\.\d+\.)layer\.1\.cross_attn\.", r"\1cross_attn.cross_attn."),
        (r"^(decoder\.layers\.\d+\.)layer\.0\.", r"\1self_attn."),
        (r"^(decoder\.layers\.\d+\.)layer\.1\.", r"\1cross_attn."),
        (r"^((?:en|de)coder\.layers\.\d+\.)(?:layer\.2|mlp)\.", r"\1"),
        (r"\.self_attn\.self_attn\.output_proj\.", ".self_attn.out_proj."),
        (r"\.cross_attn\.cross_attn\.output_proj\.", ".cross_attn.out_proj."),
        (r"\.(self|cross)_attn\.(self|cross)_attn_", r".\1_attn."),
        (r"\.(self|cross)_attn\.layer_norm\.", r".\1_attn_layer_norm."),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    ]
]
_ALIASES = [
    (re.compile(r"^decoder\.bbox_embed\.(?=layers\.)"), "bbox_predictor."),
    (re.compile(r"^decoder\.(bbox|class)_embed\.(?=\d)"), r"\1_embed."),
]
_QUERY = re.compile(r"(.*layers\.\d+\.self_attn)\.q_proj\.(weight|bias)")


def normalised_name(name: str) -> str:
    """The one spelling of a name that transformers' versions spell differently."""
    for pattern, replacement in _NORMALISED:
        name = pattern.sub(replacement, name)
    return name


def first_name(name: str) -> str:
    """The name that a normalised name is a second name of, or itself."""
    for pattern, replacement in _ALIASES:
        name = pattern.sub(replacement, name)
    return name


def pack_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of query, key and value; incomplete triples stay as they are."""
    packed = dict(tensors)
    for name in tensors:
        if match := _QUERY.fullmatch(name):
            triple = [f"{match[1]}.{letter}_proj.{match[2]}" for letter in "qkv"]
            if all(part in tensors for part in triple):
                packed[f"{match[1]}.in_proj_{match[2]}"] = torch.cat([tensors[p] for p in triple])
                for part in triple:
                    del packed[part]
    return packed


@lru_cache
def huggingface_rules(traits: Traits) -> KeyRules:
    """Our names and the normalised, packed ones of transformers."""
    our_encoder, encoder = "transformer.encoder.layers.{i}.", "encoder.layers.{i}."
    our_decoder, decoder = "transformer.decoder.layers.{i}.", "decoder.layers.{i}."
    cross = "cross_attn" if traits.dense_decoder else "encoder_attn"
    first = traits.num_layers
    pairs = [
        ("backbone.body.*", "backbone.body.*"),
        ("queries.anchors.*", "query_refpoint_embeddings.*"),
        ("queries.patterns.*", "patterns.*"),
        ("denoising.embed.label_embed.*", "label_enc.*"),
        ("transformer.level_embed", "level_embed"),
        (our_encoder + "norm.*", encoder + "self_attn_layer_norm.*"),
        (our_encoder + "self_attn.*", encoder + "self_attn.*"),
        (our_encoder + "ffn.norm.*", encoder + "final_layer_norm.*"),
        (our_decoder + "self_norm.*", decoder + "self_attn_layer_norm.*"),
        (our_decoder + "self_attn.*", decoder + "self_attn.*"),
        (our_decoder + "cross_norm.*", f"{decoder}{cross}_layer_norm.*"),
        (our_decoder + "cross_attn.*", f"{decoder}{cross}.*"),
        (our_decoder + "ffn.norm.*", decoder + "final_layer_norm.*"),
        *(
            (f"{ours}ffn.{our}.*", f"{theirs}{their}.*")
            for ours, theirs in ((our_encoder, encoder), (our_decoder, decoder))
            for our, their in (
                ("linear1", "fc1"),
                ("linear2", "fc2"),
                ("activation", "activation_fn"),
            )
        ),
        *(
            (f"transformer.{mlp}.*", f"{mlp}.*")
            for mlp in (
                "encoder.query_scale",
                "decoder.query_scale",
                "decoder.ref_point_head",
                "decoder.ref_anchor_head",
            )
        ),
        ("transformer.decoder.norm.*", "decoder.layernorm.*"),
    ]
    if traits.deformable_encoder:
        pairs += [
            ("neck.convs.{i}.*", "input_proj.{i}.0.*"),
            ("neck.norms.{i}.*", "input_proj.{i}.1.*"),
        ]
    else:
        pairs += [("neck.convs.0.*", "input_projection.*")]
    if traits.dense_decoder:
        pairs += [
            ("heads.class_embed.0.*", "class_embed.*"),
            ("heads.bbox_embed.0.*", "bbox_predictor.*"),
        ]
    else:
        pairs += [("queries.content.*", "tgt_embed.*")]
        if traits.two_stage:
            pairs += [
                ("queries.output.*", "enc_output.*"),
                ("queries.norm.*", "enc_output_norm.*"),
                ("queries.class_embed.*", f"class_embed.{first}.*"),
                ("queries.bbox_embed.*", f"bbox_embed.{first}.*"),
            ]
        pairs += [
            ("heads.class_embed.{i}.*", "class_embed.{i}.*"),
            ("heads.bbox_embed.{i}.*", "bbox_embed.{i}.*"),
        ]
    return KeyRules(tuple(pairs))
