"""Which code base a file's tensor names come from, and the way to our names and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import huggingface
from .architecture import Traits
from .class_rows import may_be_coco
from .coco_classes import COCO_IDS, COCO_NAMES, NUM_ID_ROWS
from .key_maps import (
    DETECTRON2_BACKBONE,
    TORCHVISION_BACKBONE,
    detrex_rules,
    known_aliases,
    official_rules,
    written_aliases,
)
from .manifest import CheckpointError

OURS = "dn_detr"
OFFICIAL = "official"
DETREX = "detrex"
HUGGINGFACE = "huggingface"
TORCHVISION = "torchvision"
DETECTRON2 = "detectron2"
BACKBONE_ONLY = (TORCHVISION, DETECTRON2)
WRITABLE = (OFFICIAL, DETREX)

LABEL_TABLE = "denoising.embed.label_embed.weight"
CONTENT = "queries.content.weight"
_CLASS_HEAD = re.compile(r"(heads\.class_embed\.[0-9]+|queries\.class_embed)\.(weight|bias)")
_UNUSED_BIAS = -100.0  # of a row that must never be detected

_MARKS = (  # the first that matches any name decides
    (OURS, r"(heads\.(class|bbox)_embed|queries\.(anchors|content|output)|neck\.norms)\."),
    (DETREX, r".*layers\.\d+\.(attentions|ffns|norms)\.\d+\."),
    (HUGGINGFACE, r"(model\.)?((en|de)coder\.layers\.\d+\.|backbone\.(conv_encoder|model)\.)"),
    (OFFICIAL, r"backbone\.0\.body\.|transformer\.(en|de)coder\.layers\.\d+\."),
    (DETREX, r"backbone\.(stem|res\d)\.|neck\.extra_convs\."),
    (OURS, r"backbone\.body\."),
    (DETECTRON2, r"stem\.conv1\.|res[2-5]\.\d+\.conv\d\."),
    (TORCHVISION, r"layer[1-4]\.\d+\.conv\d\."),
)
_CAFFE2 = re.compile(r"(res\d_\d+_branch\d|conv1)\w*_(w|b|s)$")
_FAMILIES = (  # what a file is that has none of our models in it
    (r"(model\.|transformer\.)?reference_points\.",
     "plain Deformable DETR, with 2-d reference points from query position embeddings instead of "
     "4-d anchor boxes, which is not an architecture of this zoo"),
    (r"query_embed\.|(model\.)?query_position_embeddings\.",
     "plain or Conditional DETR, without anchor boxes, which is not an architecture of this zoo"),
    (r"(transformer\.enc_out_(class|bbox)_embed|transformer\.tgt_embed|label_enc\.\d)",
     "DINO, which is not an architecture of this zoo"),
    (r"bbox_head\.", "a file of mmdetection, whose layout is not known here"),
    (r"(roi_heads|proposal_generator)\.", "a two-stage detector of detectron2"),
)  # fmt: skip
_DROPPED = re.compile(
    r"(.*\.)?num_batches_tracked|(stem\.|backbone\.(0\.body|body|stem)\.)?fc\.(weight|bias)"
)
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass
class Translation:
    """A file's tensors under our names.

    Attributes:
        layout: where the names come from.
        tensors: our name -> tensor, sharing memory with the file's where possible.
        origin: our name -> the file's name, where they differ.
        unknown: names of the file that have no place in any of our models.
        dropped: names that carry nothing of value here (classifier of a backbone, counters).
        unused: our name -> tensor, of what the model at hand has no use for.
    """

    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unused: dict[str, Tensor] = field(default_factory=dict)

    def file_name(self, name: str) -> str:
        """Our name, with the file's in brackets where it differs."""
        theirs = self.origin.get(name, name)
        return name if theirs == name else f"{name} ({theirs})"


def recognise(names: Collection[str]) -> str | None:
    """Name the layout of a state_dict by its keys; None if it is none that we know.

    Raises:
        CheckpointError: a backbone in Caffe2's layout, which expects other images.
    """
    if any(_CAFFE2.match(name) for name in names):
        raise CheckpointError(
            "a backbone of Caffe2 (as detectron2's MSRA R-50.pkl): it expects BGR images without "
            "division by the standard deviation, so it would run on wrong colours; take "
            "torchvision's weights (detectron2://ImageNetPretrained/torchvision/R-50.pkl)"
        )
    for layout, mark in _MARKS:
        pattern = re.compile(mark)
        if any(pattern.match(name) for name in names):
            return layout
    return None


def foreign_family(names: Collection[str]) -> str | None:
    """Say which well-known model, not one of ours, names belong to; None if unknown."""
    for mark, family in _FAMILIES:
        if any(re.match(mark, name) for name in names):
            return family
    return None


def without_wrapper(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefix that a wrapper of the model puts before every name."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_wrapper({n.removeprefix(prefix): v for n, v in tensors.items()})
    return dict(tensors)


def to_ours(tensors: Mapping[str, Tensor], layout: str) -> Translation:
    """Bring a file's tensors under our names.

    Args:
        tensors: under the names of ``layout``.
        layout: as ``recognise`` returned it.

    Raises:
        CheckpointError: two names of one tensor hold different values.
    """
    if layout == OURS:
        return Translation(layout, dict(tensors))
    first_name, rename = _way_to_ours(tensors, layout)
    result = Translation(layout)
    firsts: dict[str, Tensor] = {}
    file_names: dict[str, str] = {}
    for name, value in tensors.items():
        first = first_name(name)
        if first in firsts and not _equal(firsts[first], value):
            raise CheckpointError(
                f"{file_names[first]} and {name} are two names of one tensor, but they disagree"
            )
        if first not in firsts or name == first:
            firsts[first] = value
            file_names[first] = name
    if layout == HUGGINGFACE:
        firsts = huggingface.pack_projections(firsts)
    for first, value in firsts.items():
        name = file_names.get(first, first)
        if _DROPPED.fullmatch(first):
            result.dropped.append(name)
        elif (our := rename(first)) is None:
            result.unknown.append(name)
        else:
            result.tensors[our] = value
            result.origin[our] = name
    _split_label_table(result)
    return result


def to_layout(
    model_state: Mapping[str, Tensor],
    layout: str,
    *,
    class_names: Sequence[str | None] = (),
    torchvision_backbone: bool = False,
) -> dict[str, Tensor]:
    """Our state under the names of another code base, second names included.

    In the official layout a model of COCO's 80 classes gets the 91 class rows (92 label rows) of
    the authors' code, which counts classes by category id; rows without a class can never be
    detected. A model of 80 other classes keeps its rows.

    Args:
        model_state: state_dict of a model of ours.
        layout: "official" or "detrex".
        class_names: of the model; 80 classes without known names are taken for COCO's.
        torchvision_backbone: detrex: name the backbone as its dilated (DC5) models do.

    Returns:
        Their name -> tensor, sharing memory with ``model_state`` where nothing changes.

    Raises:
        CheckpointError: a model or a tensor without a place in that layout.
    """
    if layout not in WRITABLE:
        raise CheckpointError(f"layout {layout!r}: choose from {', '.join(WRITABLE)}")
    traits = Traits.of(model_state)
    if reason := _no_such_model(model_state, traits, layout):
        raise CheckpointError(f"the {layout} layout has no place for this model: {reason}")
    aliases = written_aliases(traits, detrex=layout == DETREX)
    if layout == OFFICIAL:
        rules = official_rules(traits)
    else:
        rules = detrex_rules(traits, torchvision_backbone=torchvision_backbone)
    state = _join_label_table(model_state, traits)
    if layout == OFFICIAL and may_be_coco(class_names, len(COCO_NAMES)):
        state = _with_rows_per_category_id(state)
    result = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        their = rules.to_theirs(name)
        if their is None:
            raise CheckpointError(f"{name} has no place in the {layout} layout")
        result[their] = value
        if alias := aliases.to_theirs(their):
            result[alias] = value
    return result


def _no_such_model(state: Mapping[str, Tensor], traits: Traits, layout: str) -> str | None:
    """Why the other code base could not load what would be written; None if it can."""
    if layout == OFFICIAL and traits.two_stage:
        return "the authors' two-stage model has tensors that ours has not (pos_trans)"
    if layout == DETREX and traits.dense_decoder and traits.deformable_encoder:
        return "detrex has no model with a deformable encoder only"
    if layout == DETREX and CONTENT in state and "queries.patterns.weight" in state:
        return "detrex has patterns in DAB-DETR only"
    return None


def _way_to_ours(
    tensors: Mapping[str, Tensor], layout: str
) -> tuple[Callable[[str], str], Callable[[str], str | None]]:
    """Second name -> first name, and first name -> our name."""
    traits = Traits.of(tensors)
    if layout == HUGGINGFACE:
        rules = huggingface.huggingface_rules(traits)
        return lambda n: huggingface.first_name(huggingface.normalised_name(n)), rules.to_ours
    if layout in BACKBONE_ONLY:
        rules = TORCHVISION_BACKBONE if layout == TORCHVISION else DETECTRON2_BACKBONE
        return lambda name: name, rules.to_ours
    aliases = known_aliases(detrex=layout == DETREX)
    if layout == OFFICIAL:
        rules = official_rules(traits)
    else:
        has_body = any(name.startswith("backbone.body.") for name in tensors)
        rules = detrex_rules(traits, torchvision_backbone=has_body)
    return lambda name: aliases.to_ours(name) or name, rules.to_ours


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.data_ptr() == other.data_ptr() or torch.equal(one, other):
        return True
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)  # NaN is reported later


def _split_label_table(translation: Translation) -> None:
    """Dense models: the published table's last row ("no object") is the content of all queries."""
    tensors = translation.tensors
    table = tensors.get(LABEL_TABLE)
    if table is not None and table.dim() == 2 and Traits.of(tensors).dense_decoder:
        tensors[LABEL_TABLE], tensors[CONTENT] = table[:-1], table[-1:]
        translation.origin[CONTENT] = translation.origin[LABEL_TABLE]


def _join_label_table(state: Mapping[str, Tensor], traits: Traits) -> dict[str, Tensor]:
    """The reverse; without denoising the rows of the classes are zero, as nothing reads them."""
    joined = dict(state)
    if traits.dense_decoder and CONTENT in joined:
        content = joined.pop(CONTENT)
        rows = joined.get(LABEL_TABLE)
        if rows is None:
            num_classes = len(state["heads.class_embed.0.bias"])
            rows = content.new_zeros(num_classes, content.shape[1])
        joined[LABEL_TABLE] = torch.cat([rows, content])
    return joined


def _with_rows_per_category_id(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    expanded = dict(state)
    ids = torch.tensor(COCO_IDS)
    for name, value in state.items():
        is_head = _CLASS_HEAD.fullmatch(name) is not None
        if is_head and len(value) == len(COCO_NAMES):
            unused = _UNUSED_BIAS if name.endswith("bias") else 0.0
            expanded[name] = value.new_full((NUM_ID_ROWS, *value.shape[1:]), unused)
            expanded[name][ids] = value
        elif name == LABEL_TABLE and len(value) == len(COCO_NAMES) + 1:
            expanded[name] = value.new_zeros(NUM_ID_ROWS + 1, *value.shape[1:])
            expanded[name][ids] = value[:-1]
            expanded[name][-1] = value[-1]
    return expanded
