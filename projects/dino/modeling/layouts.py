"""Names of tensors in DINO's own repository, in DN-DETR's DINO and in detrex.

Sources: https://github.com/IDEA-Research/DINO, https://github.com/IDEA-Research/DN-DETR,
https://github.com/IDEA-Research/detrex, projects/dino; of their backbones
https://github.com/microsoft/Swin-Transformer, https://github.com/facebookresearch/ConvNeXt
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from dn_detr.checkpoint import DetrexLayout, OfficialLayout
from dn_detr.checkpoint.layouts.family import LABEL_EMBED, Traits
from dn_detr.checkpoint.layouts.layout import Pairs

_CONTENT = ("queries.content.*", "transformer.tgt_embed.*")
_NORM = ("transformer.decoder.norm.*", "transformer.decoder.norm.*")
_OUTPUT_NORM = re.compile(r"backbone\.(0\.norm|norm|norms\.)[0-9]\.weight")
_WINDOW_INDEX = re.compile(r".*\.relative_position_index")  # follows from the size of a window
_LAYER_HEAD = re.compile(r"(class|bbox)_embed\.[0-9]+\.")


def _backbones(prefix: str, names: Collection[str]) -> Pairs:
    """Swin Transformer and ConvNeXt as their authors name them, whose last stages are returned."""
    first = 4 - sum(_OUTPUT_NORM.fullmatch(name) is not None for name in names)
    our_block, their_block = "backbone.body.stages_{i}.blocks.{j}.", prefix + "stages.{i}.{j}."
    parts = {"conv_dw": "dwconv", "norm": "norm", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
    return [
        *((f"backbone.norms.{i - first}.*", f"{prefix}norm{i}.*") for i in range(first, 4)),
        ("backbone.body.patch_embed.*", prefix + "patch_embed.*"),
        *(
            (f"backbone.body.layers_{i + 1}.downsample.*", f"{prefix}layers.{i}.downsample.*")
            for i in range(3)
        ),
        ("backbone.body.layers_{i}.*", prefix + "layers.{i}.*"),
        ("backbone.body.stem_{i}.*", prefix + "downsample_layers.0.{i}.*"),
        ("backbone.body.stages_{i}.downsample.*", prefix + "downsample_layers.{i}.*"),
        (our_block + "gamma", their_block + "gamma"),
        *((f"{our_block}{our}.*", f"{their_block}{their}.*") for our, their in parts.items()),
    ]


class DinoLayout(OfficialLayout):
    """The names of the DINO repository: one class head and one box head for all layers."""

    ignored = _WINDOW_INDEX

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return [*_backbones("backbone.0.", names), *super().pairs(names)]

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        of_cells = [
            (f"queries.{part}_embed.*", f"transformer.enc_out_{part}_embed.*")
            for part in ("class", "bbox")
        ]
        return [_CONTENT, _NORM, *of_cells, *super().pairs_of(traits)]

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`: every layer has a name for the one head."""
        return _LAYER_HEAD.sub(r"\1_embed.0.", super().first_name(name))

    def second_names(self, names: Collection[str]) -> Pairs:
        """See `Layout.second_names`; those of the heads are more than one."""
        return ()

    def missing_model(self, traits: Traits, state: Mapping[str, Tensor]) -> str:
        """See `FamilyLayout.missing_model`."""
        return "" if traits.two_stage else "it chooses its queries among the cells"

    def finish(
        self, theirs: dict[str, Tensor], class_names: Sequence[str | None], model: nn.Module | None
    ) -> dict[str, Tensor]:
        """See `Layout.finish`: every layer gets its names for the heads."""
        theirs = super().finish(theirs, class_names, model)
        for name in [name for name in theirs if _LAYER_HEAD.match(name)]:
            for layer in range(Traits.of(theirs).num_layers):
                of_layer = name.replace(".0.", f".{layer}.", 1)
                theirs[of_layer] = theirs[f"transformer.decoder.{of_layer}"] = theirs[name]
        return theirs


class DnDetrDinoLayout(OfficialLayout):
    """The names of DN-DETR's DINO, two-stage; one-stage it has those of DN-Deformable-DETR."""

    class_agnostic = True

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        return [_CONTENT, *super().pairs_of(traits)]

    def missing_model(self, traits: Traits, state: Mapping[str, Tensor]) -> str:
        """See `FamilyLayout.missing_model`."""
        return ""

    def finish(
        self, theirs: dict[str, Tensor], class_names: Sequence[str | None], model: nn.Module | None
    ) -> dict[str, Tensor]:
        """See `Layout.finish`: all rows of the cells' class head become the first one."""
        of_cells = f"class_embed.{Traits.of(theirs).num_layers}."
        first = {name: value[:1] for name, value in theirs.items() if of_cells in name}
        theirs = super().finish(theirs, class_names, model)
        return theirs | {n: row.repeat_interleave(len(theirs[n]), 0) for n, row in first.items()}


class DinoDetrexLayout(DetrexLayout):
    """The names of detrex: heads of every layer, those of the cells after them."""

    ignored = _WINDOW_INDEX

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return [*_backbones("backbone.", names), *super().pairs(names)]

    def pairs_of(self, traits: Traits) -> Pairs:
        """See `FamilyLayout.pairs_of`."""
        return [_CONTENT, _NORM, (f"{LABEL_EMBED}.*", "label_enc.*"), *super().pairs_of(traits)]

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`."""
        return name if name.startswith("label_enc.") else super().first_name(name)
