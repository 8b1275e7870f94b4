"""Names of tensors in the authors' code and in Hugging Face's version of it.

Sources: https://github.com/fundamentalvision/Deformable-DETR,
https://github.com/huggingface/transformers, models/deformable_detr
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dn_detr.checkpoint import HuggingFaceLayout, OfficialLayout
from dn_detr.checkpoint.layouts.family import CONTENT, FamilyLayout, Traits
from dn_detr.checkpoint.layouts.layout import Pairs, Translation

_ANCHORS = "queries.anchors.weight"
_LAYER_HEAD = re.compile(r"(class|bbox)_embed\.[0-9]+\.")
_PARTS = ("reference_points", "pos_trans", "pos_trans_norm")


class _DeformableDetr(FamilyLayout):
    """What both layouts have in common.

    Args:
        shared_heads: every layer has a name for the one head, as without box refinement.
    """

    can_write = False
    class_agnostic = True

    def __init__(self, shared_heads: bool = False) -> None:
        self.shared_heads = shared_heads

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`."""
        first = super().first_name(name)
        return _LAYER_HEAD.sub(r"\1_embed.0.", first) if self.shared_heads else first

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Translation:
        """See `Layout.to_ours`: one table has position and content of the queries."""
        result = super().to_ours(tensors)
        table = result.tensors.get(_ANCHORS)
        if table is not None and table.dim() == 2:
            result.tensors[_ANCHORS], result.tensors[CONTENT] = table.tensor_split(2, 1)
            result.origin[CONTENT] = result.origin[_ANCHORS]
        return result


class DeformableDetrLayout(_DeformableDetr, OfficialLayout):
    """The names of the authors' code."""

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        return [
            ("queries.anchors.*", "query_embed.*"),
            *((f"transformer.decoder.{part}.*", f"transformer.{part}.*") for part in _PARTS),
            *super().pairs_of(traits),
        ]

    def missing_model(self, traits: Traits, state: Mapping[str, Tensor]) -> str:
        """See `FamilyLayout.missing_model`."""
        return ""


class HuggingFaceDeformableLayout(_DeformableDetr, HuggingFaceLayout):
    """The names of transformers."""

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        return [
            *((f"transformer.decoder.{part}.*", f"{part}.*") for part in _PARTS),
            *super().pairs_of(traits),
        ]
