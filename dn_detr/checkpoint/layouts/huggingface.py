"""Hugging Face transformers: Detr, ConditionalDetr, DabDetr and DeformableDetr, of any version.

Published files have the names of the version that wrote them; `_NORMALISED` brings them to one
spelling. A packed projection of query, key and value is stored as three tensors.

Source: https://github.com/huggingface/transformers, models/{,conditional_,dab_,deformable_}detr
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor

from .family import DECODER, ENCODER, LABEL_EMBED, FamilyLayout, Traits, heads
from .layout import Pairs

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
        (r"\.(self|encoder)_attn\.o_proj\.", r".\1_attn.out_proj."),
    ]
]
_SECOND_NAMES = [
    (re.compile(r"^decoder\.bbox_embed\.(?=layers\.)"), "bbox_predictor."),
    (re.compile(r"^decoder\.(bbox|class)_embed\.(?=\d)"), r"\1_embed."),
]
_QUERY = re.compile(r"(.*layers\.\d+\.(?:self|encoder)_attn)\.q_proj\.(weight|bias)")
_MLPS = ("encoder.query_scale", "decoder.query_scale", "decoder.ref_point_head",
         "decoder.ref_anchor_head")  # fmt: skip


class HuggingFaceLayout(FamilyLayout):
    """The names of transformers."""

    name = "huggingface"

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`; the names are the normalised, packed ones."""
        encoder, decoder = "encoder.layers.{i}.", "decoder.layers.{i}."
        cross = "cross_attn" if traits.dense_decoder else "encoder_attn"
        pairs = [
            ("backbone.body.*", "backbone.body.*"),
            ("queries.anchors.*", "query_refpoint_embeddings.*"),
            ("queries.anchors.*", "query_position_embeddings.*"),
            ("queries.patterns.*", "patterns.*"),
            (f"{LABEL_EMBED}.*", "label_enc.*"),
            ("transformer.level_embed", "level_embed"),
            (ENCODER + "norm.*", encoder + "self_attn_layer_norm.*"),
            (ENCODER + "self_attn.*", encoder + "self_attn.*"),
            (ENCODER + "ffn.norm.*", encoder + "final_layer_norm.*"),
            (DECODER + "self_norm.*", decoder + "self_attn_layer_norm.*"),
            (DECODER + "self_attn.*", decoder + "self_attn.*"),
            (DECODER + "cross_norm.*", f"{decoder}{cross}_layer_norm.*"),
            (DECODER + "cross_attn.*", f"{decoder}{cross}.*"),
            (DECODER + "ffn.norm.*", decoder + "final_layer_norm.*"),
            *(
                (f"{ours}ffn.{our}.*", f"{theirs}{their}.*")
                for ours, theirs in ((ENCODER, encoder), (DECODER, decoder))
                for our, their in (
                    ("linear1", "fc1"),
                    ("linear2", "fc2"),
                    ("activation", "activation_fn"),
                )
            ),
            *((f"transformer.{mlp}.*", f"{mlp}.*") for mlp in _MLPS),
            ("transformer.decoder.norm.*", "decoder.layernorm.*"),
            *heads(traits, "bbox_predictor" if traits.dense_decoder else "bbox_embed"),
            ("heads.class_embed.0.*", "class_labels_classifier.*"),
            ("heads.bbox_embed.0.*", "bbox_predictor.*"),
        ]
        if traits.deformable_encoder:
            pairs += [
                ("neck.convs.{i}.*", "input_proj.{i}.0.*"),
                ("neck.norms.{i}.*", "input_proj.{i}.1.*"),
            ]
        else:
            pairs.append(("neck.convs.0.*", "input_projection.*"))
        if not traits.dense_decoder:
            pairs += [
                ("queries.content.*", "tgt_embed.*"),
                ("queries.output.*", "enc_output.*"),
                ("queries.norm.*", "enc_output_norm.*"),
            ]
        return pairs

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`."""
        for pattern, replacement in (*_NORMALISED, *_SECOND_NAMES):
            name = pattern.sub(replacement, name)
        return name

    def second_names(self, names: Collection[str]) -> Pairs:
        """See `Layout.second_names`."""
        return ()

    def arrange(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Layout.arrange`: join query, key and value; incomplete triples stay as they are."""
        packed = dict(tensors)
        for name in tensors:
            if match := _QUERY.fullmatch(name):
                triple = [f"{match[1]}.{letter}_proj.{match[2]}" for letter in "qkv"]
                parts = {(t.dtype, t.shape) for t in map(tensors.get, triple) if t is not None}
                complete = all(part in tensors for part in triple)
                if complete and len(parts) == 1 and tensors[name].dim():
                    joined = torch.cat([tensors[part] for part in triple])
                    packed[f"{match[1]}.in_proj_{match[2]}"] = joined
                    for part in triple:
                        del packed[part]
        return packed
