"""Names of tensors in the code of Anchor DETR, https://github.com/megvii-research/AnchorDETR."""

from __future__ import annotations

import re
from collections.abc import Collection

from dn_detr.checkpoint.layouts.layout import Layout, Pairs

_HEAD = re.compile(r"transformer\.(class|bbox)_embed\.[0-9]+\.")


class AnchorDetrLayout(Layout):
    """The names of Anchor DETR: every layer has a name for the one head."""

    name = "anchor_detr"
    is_coco = True
    ignored = re.compile(r"(.*\.)?total_(ops|params)")

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        layers = {
            half: [f"transformer.{half}{between}layers.{{i}}." for between in "._"]
            for half in ("encoder", "decoder")
        }
        parts = {
            "encoder": {"norm": "norm1"},
            "decoder": {"self_norm": "norm2", "cross_norm": "norm1", "cross_attn": "cross_attn"},
        }
        common = {"self_attn": "self_attn", "ffn.norm": "ffn.norm2"}
        common |= {f"ffn.linear{i}": f"ffn.linear{i}" for i in (1, 2)}
        return [
            ("backbone.body.*", "backbone.body.*"),
            ("neck.convs.{i}.*", "input_proj.{i}.0.*"),
            ("neck.norms.{i}.*", "input_proj.{i}.1.*"),
            ("queries.anchors.*", "transformer.position.*"),
            ("queries.patterns.*", "transformer.pattern.*"),
            *(
                (f"{ours}{our}.*", f"{theirs}{their}.*")
                for half, (ours, theirs) in layers.items()
                for our, their in (parts[half] | common).items()
            ),
            *(
                (
                    f"transformer.decoder.adapt_pos{d}d.layers.{i}.*",
                    f"transformer.adapt_pos{d}d.{2 * i}.*",
                )
                for d in (1, 2)
                for i in (0, 1)
            ),
            ("heads.class_embed.0.*", "transformer.class_embed.0.*"),
            ("heads.bbox_embed.0.*", "transformer.bbox_embed.0.*"),
        ]

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`."""
        return _HEAD.sub(r"transformer.\1_embed.0.", name)
