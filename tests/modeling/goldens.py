"""The published DN-Deformable-DETR with the weights and inputs of the golden files.

Our names map to those of the authors' code and of detrex by the rules below; the golden files'
fill rules give the values.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector
from dn_detr.modeling.denoising import Noise

_OFFICIAL = [
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
_DETREX = [
    (r"^backbone\.body\.conv1\.", "backbone.stem.conv1."),
    (r"^backbone\.body\.bn1\.", "backbone.stem.conv1.norm."),
    (r"^backbone\.body\.layer1\.", "backbone.res2."),
    (r"^backbone\.body\.layer2\.", "backbone.res3."),
    (r"^backbone\.body\.layer3\.", "backbone.res4."),
    (r"^backbone\.body\.layer4\.", "backbone.res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^neck\.convs\.3\.", "neck.extra_convs.0.conv."),
    (r"^neck\.norms\.3\.", "neck.extra_convs.0.norm."),
    (r"^neck\.convs\.(\d)\.", r"neck.convs.\1.conv."),
    (r"^neck\.norms\.(\d)\.", r"neck.convs.\1.norm."),
    (r"^queries\.content\.", "tgt_embed."),
    (r"^queries\.anchors\.", "refpoint_embed."),
    (r"^heads\.", ""),
    (r"level_embed$", "level_embeds"),
    (r"\.ffn\.linear1\.", ".ffns.0.layers.0.0."),
    (r"\.ffn\.linear2\.", ".ffns.0.layers.1."),
    (r"(encoder\.layers\.\d\.)self_attn\.", r"\1attentions.0."),
    (r"(encoder\.layers\.\d\.)norm\.", r"\1norms.0."),
    (r"(encoder\.layers\.\d\.)ffn\.norm\.", r"\1norms.1."),
    (r"(decoder\.layers\.\d\.)self_attn\.", r"\1attentions.0.attn."),
    (r"(decoder\.layers\.\d\.)cross_attn\.", r"\1attentions.1."),
    (r"(decoder\.layers\.\d\.)self_norm\.", r"\1norms.0."),
    (r"(decoder\.layers\.\d\.)cross_norm\.", r"\1norms.1."),
    (r"(decoder\.layers\.\d\.)ffn\.norm\.", r"\1norms.2."),
]


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def official_name(name: str) -> str:
    """The authors' state_dict key of one of our tensors."""
    return _rename(name, _OFFICIAL)


def detrex_name(name: str) -> str:
    """Detrex's state_dict key of one of our tensors."""
    return _rename(name, _DETREX)


def published_config(num_classes: int) -> Any:
    """The zoo's model with the published treatment of padding and of empty slots."""
    cfg = get_config("models/dn_deformable_detr_r50.py").model
    cfg.num_classes = num_classes
    cfg.backbone.mask_padding = False
    cfg.neck.mask_padding = False
    cfg.transformer.decoder.padded_query_pos = True
    cfg.denoising.mask_empty_slots = False
    return cfg


def build_filled(cfg: Any, values: Callable[[str, tuple[int, ...]], Any]) -> Detector:
    """Build a model and give every tensor the value that ``values`` has for its name and shape."""
    model: Detector = instantiate(cfg)
    for name, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(values(name, tuple(tensor.shape))))
    return model


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded_noise(
    counts: list[int], groups: int, flip: Tensor, chosen_labels: Tensor, box: Tensor
) -> list[Noise]:
    """The official draws, one entry per noised box and group-major over the batch, by image.

    Replacement labels were drawn for the flipped entries only.
    """
    label = torch.zeros(len(flip), dtype=torch.long)
    label[flip < 0.2] = chosen_labels
    grouped = [x.unflatten(0, (groups, -1)).split(counts, dim=1) for x in (flip, label, box)]
    return [Noise(*fields) for fields in zip(*grouped, strict=True)]
