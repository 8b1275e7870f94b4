"""detrex's DN-DETR, DAB-DETR and their deformable variants.

Its backbone has detectron2's names, or torchvision's where it is dilated ("DC5").

Source: https://github.com/IDEA-Research/detrex, projects/{dn,dab}_{,deformable_}detr
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from ..manifest import CheckpointError
from .detectron2 import RESNET
from .family import (
    CONTENT,
    DECODER,
    ENCODER,
    LABEL_EMBED,
    FamilyLayout,
    Traits,
    common,
)
from .layout import Pairs, Renaming, Translation

_TABLE = "denoising_generator.label_encoder.*"
_BACKBONE_LEVELS = 3  # levels after these are convolved from the last one
_MOST_LEVELS = 8


class DetrexLayout(FamilyLayout):
    """The names of detrex."""

    name = "detrex"
    can_write = True

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        dense_in_encoder = "" if traits.deformable_encoder else "attn."
        dense_in_decoder = "" if traits.dense_decoder else "attn."
        pairs = [
            *((f"backbone.body.{our}", f"backbone.{their}") for our, their in RESNET),
            ("backbone.body.*", "backbone.body.*"),  # of a dilated backbone
            (f"{LABEL_EMBED}.*", _TABLE),
            (ENCODER + "self_attn.*", f"{ENCODER}attentions.0.{dense_in_encoder}*"),
            (ENCODER + "norm.*", ENCODER + "norms.0.*"),
            (ENCODER + "ffn.norm.*", ENCODER + "norms.1.*"),
            (DECODER + "self_attn.*", f"{DECODER}attentions.0.{dense_in_decoder}*"),
            (DECODER + "cross_attn.*", DECODER + "attentions.1.*"),
            (DECODER + "self_norm.*", DECODER + "norms.0.*"),
            (DECODER + "cross_norm.*", DECODER + "norms.1.*"),
            (DECODER + "ffn.norm.*", DECODER + "norms.2.*"),
            *(
                (f"{layer}ffn.{our}.*", f"{layer}ffns.0.layers.{their}.*")
                for layer in (ENCODER, DECODER)
                for our, their in (("linear1", "0.0"), ("activation", "0.1"), ("linear2", "1"))
            ),
            *common(traits),
        ]
        if traits.deformable_encoder:
            pairs.append(("transformer.level_embed", "transformer.level_embeds"))
            for level in range(_MOST_LEVELS):
                extra = level - _BACKBONE_LEVELS
                their = f"neck.convs.{level}" if extra < 0 else f"neck.extra_convs.{extra}"
                pairs += [
                    (f"neck.convs.{level}.*", f"{their}.conv.*"),
                    (f"neck.norms.{level}.*", f"{their}.norm.*"),
                ]
        if traits.dense_decoder:
            norm = ("transformer.decoder.norm.*", "transformer.decoder.post_norm_layer.*")
            return [*pairs, norm, ("queries.anchors.*", "anchor_box_embed.*")]
        return [*pairs, ("queries.anchors.*", "refpoint_embed.*")]

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`."""
        for prefix in ("label_encoder.", "label_enc."):  # of its converter and first versions
            if name.startswith(prefix):
                return _TABLE.replace("*", name.removeprefix(prefix))
        return super().first_name(name.replace(".ffns.0.activation.", ".ffns.0.layers.0.1."))

    def second_names(self, names: Collection[str]) -> Pairs:
        """See `Layout.second_names`."""
        return [
            *super().second_names(names),
            *(
                (f"{layer}ffns.0.layers.0.1.*", f"{layer}ffns.0.activation.*")
                for layer in (ENCODER, DECODER)
            ),
        ]

    def missing_model(self, traits: Traits, state: Mapping[str, Tensor]) -> str:
        """See `FamilyLayout.missing_model`."""
        if traits.dense_decoder and traits.deformable_encoder:
            return "detrex has no model with a deformable encoder only"
        if CONTENT in state and "queries.patterns.weight" in state:
            return "detrex has patterns in DAB-DETR only"
        return ""

    def finish(
        self, theirs: dict[str, Tensor], class_names: Sequence[str | None], model: nn.Module | None
    ) -> dict[str, Tensor]:
        """See `Layout.finish`: the backbone of a dilated `model` keeps torchvision's names."""
        if not _is_dilated(model):
            return theirs
        to_torchvision = Renaming((f"backbone.{d2}", f"backbone.body.{tv}") for tv, d2 in RESNET)
        return {to_torchvision(name) or name: value for name, value in theirs.items()}

    def check(self, translation: Translation, model: nn.Module) -> None:
        """See `Layout.check`: shapes do not tell a dilated backbone, but detrex's names do."""
        names = [name for name in translation.origin.values() if name.startswith("backbone.")]
        file_is_dilated = any(name.startswith("backbone.body.") for name in names)
        if names and file_is_dilated != _is_dilated(model):
            kinds = ("one without dilation", "a dilated one (DC5)")
            raise CheckpointError(
                f"the backbone is {kinds[file_is_dilated]}, that of the model is "
                f"{kinds[not file_is_dilated]}; take the config that has it "
                "(model.backbone.dilation)"
            )


def _is_dilated(model: nn.Module | None) -> bool:
    """Whether the last stage has stride 16 ("DC5")."""
    return list(getattr(getattr(model, "backbone", None), "out_strides", [])) == [16]
