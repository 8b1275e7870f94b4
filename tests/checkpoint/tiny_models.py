"""Every architecture of the zoo, small: real configs with few channels and layers."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch

from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector

ARCHITECTURES = (
    "dab_detr_r50",
    "dn_detr_r50",
    "dab_deformable_detr_r50",
    "dab_deformable_detr_r50_two_stage",
    "dn_deformable_detr_r50",
    "dn_deformable_encoder_only_r50",
)
DEPTH = {"resnet18": [128, 256, 512], "resnet34": [128, 256, 512], "resnet50": [512, 1024, 2048]}


def tiny_config(
    name: str, *, num_classes: int = 80, backbone: str = "resnet18", num_patterns: int | None = None
) -> Any:
    cfg = get_config(f"models/{name}.py").model
    cfg.num_classes = num_classes
    cfg.num_queries = 7
    cfg.backbone.name = backbone
    cfg.backbone.weights = None
    channels = DEPTH[backbone]
    cfg.neck.in_channels = channels[-len(cfg.neck.in_channels) :]
    cfg.transformer.embed_dim = 32
    cfg.position_embedding.num_pos_feats = 16
    for half in (cfg.transformer.encoder, cfg.transformer.decoder):
        half.num_layers = 2
        half.layer.update(num_heads=2, feedforward_dim=8)
    if num_patterns is not None:
        cfg.num_patterns = num_patterns
    return cfg


def tiny_model(name: str, *, seed: int = 0, **knobs: Any) -> Detector:
    """A model away from its initialisation: all tensors differ, buffers too."""
    model = copy.deepcopy(_built(name, **knobs))
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(generator=generator)
    return model


@lru_cache
def _built(name: str, **knobs: Any) -> Detector:
    model: Detector = instantiate(tiny_config(name, **knobs))
    return model


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
