"""Names of tensors in the code of DETR, https://github.com/facebookresearch/detr."""

from __future__ import annotations

from dn_detr.checkpoint.layouts.family import DECODER, ENCODER, FamilyLayout, Traits
from dn_detr.checkpoint.layouts.layout import Pairs


class DetrLayout(FamilyLayout):
    """The names of DETR: rows of its class head are COCO's category ids, then "no object"."""

    name = "detr"

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        norms = {ENCODER: ("norm", "ffn.norm"), DECODER: ("self_norm", "cross_norm", "ffn.norm")}
        return [
            ("backbone.body.*", "backbone.0.body.*"),
            ("neck.convs.0.*", "input_proj.*"),
            ("queries.anchors.*", "query_embed.*"),
            (DECODER + "cross_attn.*", DECODER + "multihead_attn.*"),
            *((f"{layer}self_attn.*", f"{layer}self_attn.*") for layer in norms),
            *(
                (f"{layer}ffn.linear{i}.*", f"{layer}linear{i}.*")
                for layer in norms
                for i in (1, 2)
            ),
            *(
                (f"{layer}{our}.*", f"{layer}norm{i}.*")
                for layer, ours in norms.items()
                for i, our in enumerate(ours, 1)
            ),
            ("transformer.decoder.norm.*", "transformer.decoder.norm.*"),
            ("heads.class_embed.0.*", "class_embed.*"),
            ("heads.bbox_embed.0.*", "bbox_embed.*"),
        ]
