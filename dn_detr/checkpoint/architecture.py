"""What tensor names and shapes say about the model that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_DECODER_LAYER = re.compile(r"decoder\.layers\.([0-9]+)\.")
_DENSE_DECODER = re.compile(r"decoder\.layers\..*content_proj\.")
_DEFORMABLE_ENCODER = re.compile(r"encoder\.layers\..*sampling_offsets\.")
# blocks of the four stages, whether they are bottlenecks
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((3, 4, 6, 3), True): "ResNet-50",
    ((3, 4, 23, 3), True): "ResNet-101",
    ((3, 8, 36, 3), True): "ResNet-152",
    ((2, 2, 2, 2), False): "ResNet-18",
    ((3, 4, 6, 3), False): "ResNet-34",
}


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


def describe_architecture(tensors: Mapping[str, Tensor]) -> str:
    """Say in a few words which model of the family our tensor names and shapes belong to.

    Args:
        tensors: state under our names; incomplete ones are described as far as they go.

    Returns:
        For example "dense single-scale DN-DETR, ResNet-101, 300 queries, 3 patterns, 91 classes".
    """
    parts = [f"{_detector(tensors)}, {_backbone(tensors)}"]
    for name, unit in (
        ("queries.anchors.weight", "queries"),
        ("queries.patterns.weight", "patterns"),
        ("transformer.level_embed", "feature levels"),
        ("heads.class_embed.0.weight", "classes"),
    ):
        if name in tensors and tensors[name].dim() > 0:
            parts.append(f"{len(tensors[name])} {unit}")
    return ", ".join(parts)


def describe_backbone(names: Iterable[str]) -> str:
    """Say which ResNet tensor names belong to.

    Args:
        names: as torchvision's: ``conv1.weight``, ``layer3.10.conv1.weight``, ...

    Returns:
        For example "ResNet-101", or "no known ResNet".
    """
    return _RESNETS.get(_blocks(list(names)), "no known ResNet")


def _detector(tensors: Mapping[str, Tensor]) -> str:
    traits = Traits.of(tensors)
    if not traits.num_layers:
        return "no detector of this family"
    kind = {
        (True, False): "dense single-scale {}-DETR",
        (True, True): "{}-DETR with a deformable encoder only",
        (False, True): "{}-Deformable-DETR",
        (False, False): "{}-DETR of unknown encoder",
    }[traits.dense_decoder, traits.deformable_encoder]
    denoising = any(name.startswith("denoising.") for name in tensors)
    two_stage = ", two-stage" if traits.two_stage else ""
    return kind.format("DN" if denoising else "DAB") + two_stage


def _backbone(tensors: Mapping[str, Tensor]) -> str:
    names = [name.removeprefix("backbone.body.") for name in tensors if "backbone.body." in name]
    if not names:
        return "no backbone"
    blocks = _blocks(names)
    if not blocks[0]:
        return f"a backbone that is no ResNet ({names[0]}, ...)"
    return _RESNETS.get(blocks, f"a ResNet of {blocks[0]} blocks")


def _blocks(names: Sequence[str]) -> tuple[tuple[int, ...], bool]:
    """Blocks of each stage of a ResNet, and whether they are bottlenecks."""
    blocks: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"layer([1-4])\.([0-9]+)\.", name):
            blocks.setdefault(match[1], set()).add(int(match[2]))
    depth = tuple(len(blocks[stage]) for stage in sorted(blocks))
    return depth, any(".conv3." in name for name in names)
