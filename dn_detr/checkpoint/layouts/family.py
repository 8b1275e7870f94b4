"""What the layouts of the DN-DETR family have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..manifest import CheckpointError
from .layout import Layout, Pairs, Translation

LABEL_EMBED = "denoising.embed.label_embed"
LABEL_TABLE = f"{LABEL_EMBED}.weight"
CONTENT = "queries.content.weight"
ENCODER = "transformer.encoder.layers.{i}."
DECODER = "transformer.decoder.layers.{i}."

_CELL_CLASSES = ("queries.class_embed.weight", "queries.class_embed.bias")
_DECODER_LAYER = re.compile(r"decoder\.layers\.([0-9]{1,3})\.")
_DENSE_DECODER = re.compile(r"decoder\.layers\..*content_proj\.")
_DEFORMABLE_ENCODER = re.compile(r"encoder\.layers\..*sampling_offsets\.")


@dataclass(frozen=True)
class Traits:
    """What decides how a layout names its tensors; read from names of any layout.

    Attributes:
        dense_decoder: cross-attention to every cell (DAB-DETR), not deformable.
        deformable_encoder: the encoder samples several levels.
        two_stage: queries are chosen among the cells of the memory.
        num_layers: decoder layers, 0 if there is no decoder.
    """

    dense_decoder: bool
    deformable_encoder: bool
    two_stage: bool
    num_layers: int

    @classmethod
    def of(cls, names: Iterable[str]) -> Traits:
        """Read the traits from the names of a state_dict."""
        names = list(names)
        layers = [int(match[1]) for name in names if (match := _DECODER_LAYER.search(name))]
        return cls(
            dense_decoder=any(_DENSE_DECODER.search(name) for name in names),
            deformable_encoder=any(_DEFORMABLE_ENCODER.search(name) for name in names),
            two_stage=any("enc_output." in n or n.startswith("queries.output.") for n in names),
            num_layers=max(layers, default=-1) + 1,
        )


class FamilyLayout(Layout):
    """A layout of DAB-DETR, DN-DETR and their deformable variants.

    The published table of labels of dense models has one row more than ours, "no object", which is
    the content of all their queries.

    Attributes:
        class_agnostic: the first row of the cells' class head finds all objects, see
            `ProposalQueries`. Every row becomes that one, so that it is the first one whatever
            the classes are.
    """

    is_coco = True
    class_agnostic = False
    ignored = re.compile(r"(.*\.)?fc\.(weight|bias)")  # the classifier of the backbone

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return self.pairs_of(Traits.of(names))

    @abstractmethod
    def pairs_of(self, traits: Traits) -> Pairs:
        """Return `pairs` for a model with these traits."""

    def first_name(self, name: str) -> str:
        """See `Layout.first_name`: the decoder refers to the heads."""
        if name.startswith(("transformer.decoder.bbox_embed.", "transformer.decoder.class_embed.")):
            return name.removeprefix("transformer.decoder.")
        return name

    def second_names(self, names: Collection[str]) -> Pairs:
        """See `Layout.second_names`."""
        parts = ["bbox_embed", *(["class_embed"] if Traits.of(names).two_stage else [])]
        return [(f"{part}.*", f"transformer.decoder.{part}.*") for part in parts]

    def missing_model(self, traits: Traits, state: Mapping[str, Tensor]) -> str:
        """Say why the other code base has no such model; an empty string if it has."""
        return ""

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Translation:
        """See `Layout.to_ours`."""
        result = super().to_ours(tensors)
        table = result.tensors.get(LABEL_TABLE)
        if table is not None and table.dim() == 2 and Traits.of(tensors).dense_decoder:
            result.tensors[LABEL_TABLE], result.tensors[CONTENT] = table[:-1], table[-1:]
            result.origin[CONTENT] = result.origin[LABEL_TABLE]
        if self.class_agnostic:
            for name in _CELL_CLASSES:
                rows = result.tensors.get(name)
                if rows is not None and rows.dim():
                    result.tensors[name] = rows[:1].expand_as(rows)
        return result

    def rejoin(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Layout.rejoin`: the table of labels takes the content of dense models' queries."""
        traits = Traits.of(state)
        if reason := self.missing_model(traits, state):
            raise CheckpointError(f"the {self.name} layout has no place for this model: {reason}")
        joined = dict(state)
        if traits.dense_decoder and CONTENT in joined:
            content = joined.pop(CONTENT)
            rows = joined.get(LABEL_TABLE)
            if rows is None:  # without denoising nothing reads the rows of the classes
                rows = content.new_zeros(len(state["heads.class_embed.0.bias"]), content.shape[1])
            joined[LABEL_TABLE] = torch.cat([rows, content])
        return joined


def heads(traits: Traits, bbox_embed: str = "bbox_embed") -> list[tuple[str, str]]:
    """Return pairs for the heads: one for all layers, or one per layer.

    The heads of two-stage query selection are the ones after those of the last layer.
    """
    if traits.dense_decoder:
        return [
            ("heads.class_embed.0.*", "class_embed.*"),
            ("heads.bbox_embed.0.*", f"{bbox_embed}.*"),
        ]
    of_memory = [
        ("queries.class_embed.*", f"class_embed.{traits.num_layers}.*"),
        ("queries.bbox_embed.*", f"bbox_embed.{traits.num_layers}.*"),
    ]
    return [
        *(of_memory if traits.two_stage else []),
        ("heads.class_embed.{i}.*", "class_embed.{i}.*"),
        ("heads.bbox_embed.{i}.*", "bbox_embed.{i}.*"),
    ]


def common(traits: Traits) -> list[tuple[str, str]]:
    """Return pairs that the authors' code and detrex share."""
    pairs = heads(traits)
    if traits.two_stage:
        pairs += [
            ("queries.output.*", "transformer.enc_output.*"),
            ("queries.norm.*", "transformer.enc_output_norm.*"),
        ]
    pairs.append(("queries.patterns.*", "transformer.patterns.*"))
    if not traits.deformable_encoder:
        pairs += [
            ("neck.convs.0.*", "input_proj.*"),
            ("transformer.encoder.query_scale.*", "transformer.encoder.query_scale.*"),
        ]
    mlps = ["ref_point_head", "query_scale", *(["ref_anchor_head"] if traits.dense_decoder else [])]
    pairs += [(f"transformer.decoder.{mlp}.*", f"transformer.decoder.{mlp}.*") for mlp in mlps]
    if not traits.dense_decoder:
        pairs.append(("queries.content.*", "tgt_embed.*"))
    return pairs
