"""The published DN-Deformable-DETR with the weights and inputs of the golden files.

Our names map to the official ones by the rules below; the official fill rule gives the values.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dn_detr.modeling import Detector
from dn_detr.modeling.denoising import Noise

_RULES = [
    (r"^backbone\.body\.", "backbone.0.body."),
    (r"^neck\.convs\.(\d)\.", r"input_proj.\1.0."),
    (r"^neck\.norms\.(\d)\.", r"input_proj.\1.1."),
    (r"^queries\.content\.", "tgt_embed."),
    (r"^queries\.anchors\.", "refpoint_embed."),
    (r"^denoising\.label_embed\.", "label_enc."),
    (r"^heads\.", ""),
    (r"(encoder\.layers\.\d\.)norm\.", r"\1norm1."),
    (r"(encoder\.layers\.\d\.)ffn\.norm\.", r"\1norm2."),
    (r"(decoder\.layers\.\d\.)cross_norm\.", r"\1norm1."),
    (r"(decoder\.layers\.\d\.)self_norm\.", r"\1norm2."),
    (r"(decoder\.layers\.\d\.)ffn\.norm\.", r"\1norm3."),
    (r"\.ffn\.linear", ".linear"),
]


def official_name(name: str) -> str:
    """The official state_dict key of one of our parameters."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(model: Detector, rules: ModuleType) -> None:
    """Give every tensor of the model its golden value."""
    for name, tensor in model.state_dict().items():
        value = torch.from_numpy(rules.fill_tensor(official_name(name), tuple(tensor.shape)))
        tensor.copy_(value.reshape(tensor.shape))


def recorded_noise(
    counts: list[int], groups: int, flip: Tensor, chosen_labels: Tensor, box: Tensor
) -> list[Noise]:
    """The official draws, one entry per noised box and group-major over the batch, by image.

    Replacement labels were drawn for the flipped entries only.
    """
    label = torch.zeros(len(flip), dtype=torch.long)
    label[flip < 0.2] = chosen_labels
    grouped = [x.unflatten(0, (groups, -1)).split(counts, dim=1) for x in (flip, label, box)]
    return [Noise(*fields) for fields in zip(*grouped)]
