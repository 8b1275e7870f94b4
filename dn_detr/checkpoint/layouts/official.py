"""The authors' code of DN-DETR and DAB-DETR.

Source: https://github.com/IDEA-Research/DN-DETR, https://github.com/IDEA-Research/DAB-DETR
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..class_rows import may_be_coco
from ..coco_classes import COCO_IDS, COCO_NAMES, NUM_ID_ROWS
from .family import DECODER, ENCODER, LABEL_EMBED, FamilyLayout, Traits, common
from .layout import Pairs

_CLASS_TENSOR = re.compile(r"(transformer\.decoder\.)?(class_embed\..*|label_enc\.weight)")
_UNUSED_BIAS = -100.0  # of a row that must never be detected
_PROJECTIONS = {
    "query_content": "qcontent",
    "query_pos": "qpos",
    "query_pos_sine": "qpos_sine",
    "key_content": "kcontent",
    "key_pos": "kpos",
    "value": "v",
}


class OfficialLayout(FamilyLayout):
    """The names of the authors' code, which counts COCO's classes by category id in 91 rows."""

    name = "official"
    can_write = True

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        pairs = [
            ("backbone.body.*", "backbone.0.body.*"),
            ("queries.anchors.*", "refpoint_embed.*"),
            (f"{LABEL_EMBED}.*", "label_enc.*"),
            (ENCODER + "self_attn.*", ENCODER + "self_attn.*"),
            (ENCODER + "norm.*", ENCODER + "norm1.*"),
            (ENCODER + "ffn.norm.*", ENCODER + "norm2.*"),
            (DECODER + "ffn.norm.*", DECODER + "norm3.*"),
            *(
                (f"{layer}ffn.{part}.*", f"{layer}{part}.*")
                for layer in (ENCODER, DECODER)
                for part in ("linear1", "linear2", "activation")
            ),
            *common(traits),
        ]
        if traits.deformable_encoder:
            pairs += [
                ("neck.convs.{i}.*", "input_proj.{i}.0.*"),
                ("neck.norms.{i}.*", "input_proj.{i}.1.*"),
                ("transformer.level_embed", "transformer.level_embed"),
            ]
        if not traits.dense_decoder:
            return [
                *pairs,
                (DECODER + "self_attn.*", DECODER + "self_attn.*"),
                (DECODER + "cross_attn.*", DECODER + "cross_attn.*"),
                (DECODER + "cross_norm.*", DECODER + "norm1.*"),
                (DECODER + "self_norm.*", DECODER + "norm2.*"),
            ]
        out = "ca_out_v_proj" if traits.deformable_encoder else "cross_attn.out_proj"
        return [
            *pairs,
            *(
                (f"{DECODER}{our}_attn.{name}_proj.*", f"{DECODER}{their}_{short}_proj.*")
                for our, their in (("self", "sa"), ("cross", "ca"))
                for name, short in _PROJECTIONS.items()
            ),
            (DECODER + "self_attn.out_proj.*", DECODER + "self_attn.out_proj.*"),
            (DECODER + "cross_attn.out_proj.*", f"{DECODER}{out}.*"),
            (DECODER + "cross_attn.level_attn.*", DECODER + "lvl_attn.*"),
            (DECODER + "self_norm.*", DECODER + "norm1.*"),
            (DECODER + "cross_norm.*", DECODER + "norm2.*"),
            ("transformer.decoder.norm.*", "transformer.decoder.norm.*"),
        ]

    def missing_model(self, traits: Traits, state: Mapping[str, Tensor]) -> str:
        """See `FamilyLayout.missing_model`."""
        if traits.two_stage:
            return "the authors' two-stage model has tensors that ours has not (pos_trans)"
        return ""

    def finish(
        self, theirs: dict[str, Tensor], class_names: Sequence[str | None], model: nn.Module | None
    ) -> dict[str, Tensor]:
        """See `Layout.finish`: a model of COCO's 80 classes gets 91 class and 92 label rows.

        80 classes without known names are taken for COCO's.
        """
        if not may_be_coco(class_names, len(COCO_NAMES)):
            return theirs
        ids = torch.tensor(COCO_IDS)
        for name, value in theirs.items():
            if not _CLASS_TENSOR.fullmatch(name):
                continue
            more = int(name == "label_enc.weight")  # the row of no object
            if len(value) == len(COCO_NAMES) + more:
                unused = _UNUSED_BIAS if name.endswith("bias") else 0.0
                rows = value.new_full((NUM_ID_ROWS + more, *value.shape[1:]), unused)
                rows[ids] = value[: len(COCO_NAMES)]
                rows[NUM_ID_ROWS:] = value[len(COCO_NAMES) :]
                theirs[name] = rows
        return theirs
