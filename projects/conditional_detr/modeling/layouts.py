"""Names of tensors in the authors' code and in Hugging Face's version of it.

Sources: https://github.com/Atten4Vis/ConditionalDETR,
https://github.com/huggingface/transformers, models/conditional_detr
"""

from __future__ import annotations

import re

from dn_detr.checkpoint import HuggingFaceLayout, OfficialLayout
from dn_detr.checkpoint.layouts.family import DECODER, Traits
from dn_detr.checkpoint.layouts.layout import Pairs

_EARLIER = re.compile(r"\.(sa|ca)_([qkv])(content|pos)?(_sine)?_proj\.")
_ATTENTION = {"sa": "self_attn", "ca": "encoder_attn"}


class ConditionalDetrLayout(OfficialLayout):
    """The names of the authors' code, which DAB-DETR's has kept, but for the queries."""

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        return [("queries.anchors.*", "query_embed.*"), *super().pairs_of(traits)]


class HuggingFaceConditionalLayout(HuggingFaceLayout):
    """The names of transformers, whose earlier versions have the projections in the layer."""

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        their_decoder = "decoder.layers.{i}."
        projections = [
            (f"{our}_{part}_proj", f"{their}_{part}_proj")
            for our, their in (("query", "q"), ("key", "k"))
            for part in ("content", "pos")
        ]
        projections += [("query_pos_sine_proj", "q_pos_sine_proj"), ("value_proj", "v_proj")]
        return [
            *(
                (f"{DECODER}{attn}.{our}.*", f"{their_decoder}{_ATTENTION[short]}.{their}.*")
                for short, attn in (("sa", "self_attn"), ("ca", "cross_attn"))
                for our, their in (*projections, ("out_proj", "out_proj"))
            ),
            (DECODER + "cross_norm.*", their_decoder + "encoder_attn_layer_norm.*"),
            *super().pairs_of(traits),
        ]

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`."""
        return _EARLIER.sub(
            lambda found: (
                f".{_ATTENTION[found[1]]}."
                + "_".join(p for p in (found[2], found[3], found[4] and "sine", "proj") if p)
                + "."
            ),
            super().first_name(name),
        )
