"""Names of our tensors in the layouts of other code bases.

Official: IDEA-Research/DN-DETR and DAB-DETR. Detrex: IDEA-Research/detrex, whose backbone has
detectron2's names, or torchvision's where it is dilated ("DC5").
"""

from __future__ import annotations

from functools import lru_cache

from .architecture import Traits
from .key_rules import KeyRules

_RESNET_IN_DETECTRON2 = [
    ("bn1.*", "stem.conv1.norm.*"),
    ("conv1.*", "stem.conv1.*"),
    *(
        pair
        for stage in (1, 2, 3, 4)
        for pair in (
            (f"layer{stage}.{{i}}.bn{{n}}.*", f"res{stage + 1}.{{i}}.conv{{n}}.norm.*"),
            (f"layer{stage}.{{i}}.conv{{n}}.*", f"res{stage + 1}.{{i}}.conv{{n}}.*"),
            (f"layer{stage}.{{i}}.downsample.1.*", f"res{stage + 1}.{{i}}.shortcut.norm.*"),
            (f"layer{stage}.{{i}}.downsample.0.*", f"res{stage + 1}.{{i}}.shortcut.*"),
        )
    ),
]
_QUERIES_OF_MEMORY = [
    ("queries.output.*", "transformer.enc_output.*"),
    ("queries.norm.*", "transformer.enc_output_norm.*"),
]
_DENSE_ENCODER = [
    ("neck.convs.0.*", "input_proj.*"),
    ("transformer.encoder.query_scale.*", "transformer.encoder.query_scale.*"),
]
_DECODER_MLPS = [
    ("transformer.decoder.ref_point_head.*", "transformer.decoder.ref_point_head.*"),
    ("transformer.decoder.query_scale.*", "transformer.decoder.query_scale.*"),
]
_DENSE_DECODER_MLPS = [
    *_DECODER_MLPS,
    ("transformer.decoder.ref_anchor_head.*", "transformer.decoder.ref_anchor_head.*"),
]
_BOX_ALIAS = ("bbox_embed.*", "transformer.decoder.bbox_embed.*")
_CLASS_ALIAS = ("class_embed.*", "transformer.decoder.class_embed.*")
_PRELU_ALIASES = [
    (f"{part}.layers.{{i}}.ffns.0.layers.0.1.*", f"{part}.layers.{{i}}.ffns.0.activation.*")
    for part in ("transformer.encoder", "transformer.decoder")
]
# Names that detrex's converter and its first versions gave to the table.
_LABEL_TABLE_ALIASES = [
    ("denoising_generator.label_encoder.*", "label_encoder.*"),
    ("denoising_generator.label_encoder.*", "label_enc.*"),
]

TORCHVISION_BACKBONE = KeyRules((("backbone.body.*", "*"),))
DETECTRON2_BACKBONE = KeyRules(
    tuple((f"backbone.body.{our}", their) for our, their in _RESNET_IN_DETECTRON2)
)


@lru_cache
def official_rules(traits: Traits) -> KeyRules:
    """Our names and those of the authors' code."""
    encoder, decoder = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
    pairs = [
        ("backbone.body.*", "backbone.0.body.*"),
        ("queries.anchors.*", "refpoint_embed.*"),
        ("queries.patterns.*", "transformer.patterns.*"),
        ("denoising.embed.label_embed.*", "label_enc.*"),
        (encoder + "self_attn.*", encoder + "self_attn.*"),
        (encoder + "norm.*", encoder + "norm1.*"),
        (encoder + "ffn.norm.*", encoder + "norm2.*"),
        *_official_feed_forward(encoder),
        *_heads(traits),
        *_official_attention(traits),
        (decoder + "ffn.norm.*", decoder + "norm3.*"),
        *_official_feed_forward(decoder),
    ]
    if traits.deformable_encoder:
        pairs += [
            ("neck.convs.{i}.*", "input_proj.{i}.0.*"),
            ("neck.norms.{i}.*", "input_proj.{i}.1.*"),
            ("transformer.level_embed", "transformer.level_embed"),
        ]
    else:
        pairs += _DENSE_ENCODER
    if traits.dense_decoder:
        pairs += [
            *_DENSE_DECODER_MLPS,
            ("transformer.decoder.norm.*", "transformer.decoder.norm.*"),
        ]
    else:
        pairs += [*_DECODER_MLPS, ("queries.content.*", "tgt_embed.*")]
    return KeyRules(tuple(pairs))


def _official_feed_forward(layer: str) -> list[tuple[str, str]]:
    return [(f"{layer}ffn.{p}.*", f"{layer}{p}.*") for p in ("linear1", "linear2", "activation")]


def _official_attention(traits: Traits) -> list[tuple[str, str]]:
    layer = "transformer.decoder.layers.{i}."
    if not traits.dense_decoder:
        return [
            (layer + "self_attn.*", layer + "self_attn.*"),
            (layer + "cross_attn.*", layer + "cross_attn.*"),
            (layer + "cross_norm.*", layer + "norm1.*"),
            (layer + "self_norm.*", layer + "norm2.*"),
        ]
    short = {
        "query_content": "qcontent",
        "query_pos": "qpos",
        "query_pos_sine": "qpos_sine",
        "key_content": "kcontent",
        "key_pos": "kpos",
        "value": "v",
    }
    out = "ca_out_v_proj" if traits.deformable_encoder else "cross_attn.out_proj"
    return [
        *(
            (f"{layer}{our}_attn.{name}_proj.*", f"{layer}{their}_{abbreviated}_proj.*")
            for our, their in (("self", "sa"), ("cross", "ca"))
            for name, abbreviated in short.items()
        ),
        (layer + "self_attn.out_proj.*", layer + "self_attn.out_proj.*"),
        (layer + "cross_attn.out_proj.*", f"{layer}{out}.*"),
        (layer + "cross_attn.level_attn.*", layer + "lvl_attn.*"),
        (layer + "self_norm.*", layer + "norm1.*"),
        (layer + "cross_norm.*", layer + "norm2.*"),
    ]


@lru_cache
def detrex_rules(traits: Traits, *, torchvision_backbone: bool = False) -> KeyRules:
    """Our names and detrex's; ``torchvision_backbone`` for its dilated (DC5) models."""
    encoder, decoder = "transformer.encoder.layers.{i}.", "transformer.decoder.layers.{i}."
    dense_in_encoder = "" if traits.deformable_encoder else "attn."
    dense_in_decoder = "" if traits.dense_decoder else "attn."
    if torchvision_backbone:
        pairs = [("backbone.body.*", "backbone.body.*")]
    else:
        pairs = [
            (f"backbone.body.{our}", f"backbone.{their}") for our, their in _RESNET_IN_DETECTRON2
        ]
    pairs += [
        ("queries.patterns.*", "transformer.patterns.*"),
        ("denoising.embed.label_embed.*", "denoising_generator.label_encoder.*"),
        (encoder + "self_attn.*", f"{encoder}attentions.0.{dense_in_encoder}*"),
        (encoder + "norm.*", encoder + "norms.0.*"),
        (encoder + "ffn.norm.*", encoder + "norms.1.*"),
        (decoder + "self_attn.*", f"{decoder}attentions.0.{dense_in_decoder}*"),
        (decoder + "cross_attn.*", decoder + "attentions.1.*"),
        (decoder + "self_norm.*", decoder + "norms.0.*"),
        (decoder + "cross_norm.*", decoder + "norms.1.*"),
        (decoder + "ffn.norm.*", decoder + "norms.2.*"),
        *(
            (f"{layer}ffn.{our}.*", f"{layer}ffns.0.layers.{their}.*")
            for layer in (encoder, decoder)
            for our, their in (("linear1", "0.0"), ("activation", "0.1"), ("linear2", "1"))
        ),
        *_heads(traits),
    ]
    if traits.deformable_encoder:
        pairs += [*_detrex_neck(), ("transformer.level_embed", "transformer.level_embeds")]
    else:
        pairs += _DENSE_ENCODER
    if traits.dense_decoder:
        pairs += [
            *_DENSE_DECODER_MLPS,
            ("transformer.decoder.norm.*", "transformer.decoder.post_norm_layer.*"),
            ("queries.anchors.*", "anchor_box_embed.*"),
        ]
    else:
        pairs += [
            *_DECODER_MLPS,
            ("queries.content.*", "tgt_embed.*"),
            ("queries.anchors.*", "refpoint_embed.*"),
        ]
    return KeyRules(tuple(pairs))


def _detrex_neck(backbone_levels: int = 3, most_levels: int = 8) -> list[tuple[str, str]]:
    """Levels of the backbone, then levels that are convolved from its last one."""
    pairs = []
    for level in range(most_levels):
        extra = level - backbone_levels
        their = f"neck.convs.{level}" if extra < 0 else f"neck.extra_convs.{extra}"
        pairs += [
            (f"neck.convs.{level}.*", f"{their}.conv.*"),
            (f"neck.norms.{level}.*", f"{their}.norm.*"),
        ]
    return pairs


def _heads(traits: Traits) -> list[tuple[str, str]]:
    """Heads are named alike everywhere: one for all layers, or one per layer.

    The heads of two-stage query selection are the ones after those of the last layer.
    """
    if traits.dense_decoder:
        return [
            ("heads.class_embed.0.*", "class_embed.*"),
            ("heads.bbox_embed.0.*", "bbox_embed.*"),
        ]
    first = traits.num_layers
    of_memory = [
        *_QUERIES_OF_MEMORY,
        ("queries.class_embed.*", f"class_embed.{first}.*"),
        ("queries.bbox_embed.*", f"bbox_embed.{first}.*"),
    ]
    return [
        *(of_memory if traits.two_stage else []),
        ("heads.class_embed.{i}.*", "class_embed.{i}.*"),
        ("heads.bbox_embed.{i}.*", "bbox_embed.{i}.*"),
    ]


def written_aliases(traits: Traits, *, detrex: bool) -> KeyRules:
    """Second names that one tensor has in a file: (name, second name)."""
    pairs = [_BOX_ALIAS, *([_CLASS_ALIAS] if traits.two_stage else [])]
    return KeyRules((*pairs, *(_PRELU_ALIASES if detrex else [])))


def known_aliases(*, detrex: bool) -> KeyRules:
    """All second names that files of any version may have: (name, second name)."""
    pairs = [_BOX_ALIAS, _CLASS_ALIAS]
    return KeyRules((*pairs, *([*_PRELU_ALIASES, *_LABEL_TABLE_ALIASES] if detrex else [])))
