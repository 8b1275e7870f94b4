"""The models of the zoo by name: which there are, how large they are, how to build one.

    from dn_detr import model_zoo

    model = model_zoo.get_model("dn_deformable_detr_r50_50ep", checkpoint="checkpoint0049.pth")

docs/model_zoo.md is the table of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dn_detr.ops  # noqa: F401  registers the operators that are counted
from dn_detr.checkpoint import load_model_weights
from dn_detr.config import ConfigError, LazyConfig, get_config, instantiate, list_configs
from dn_detr.config.errors import did_you_mean


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        parameters: number of parameters, frozen ones included.
        multiply_adds: of detecting in one image; a multiplication with an addition counts once.
            None where they depend on the image (a model without `forward_tensors`).
    """

    parameters: int
    multiply_adds: int | None


def list_models() -> list[str]:
    """Names of all models of the zoo and the projects, sorted: config files without `.py`."""
    return [name.removesuffix(".py") for name in list_configs()]


def get_model(
    name: str,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    overrides: Sequence[str] = (),
    *,
    class_names: Sequence[str] = (),
    fine_tune: bool = False,
) -> nn.Module:
    """Build a model of the zoo, ready to detect; what was loaded is logged.

    Args:
        name: one of `list_models()`.
        checkpoint: the weights, of any code base that `dn_detr.checkpoint.load_model_weights`
            reads. None: all weights are random, those of the backbone too; nothing is downloaded.
        device: where the model goes.
        overrides: of its config, as on the command line: `["model.num_classes=3"]`.
        class_names: of your classes; index = class. Needed to find rows by name.
        fine_tune: weights of other classes, or of a backbone alone, are welcome: see
            `load_model_weights`. By default every tensor must come from the checkpoint.

    Returns:
        The detector, in evaluation mode: a `Detector`, or another `protocols.Model` of a project.

    Raises:
        ConfigError: no such model (the message has the nearest name), or a wrong override.
        TypeError: `name` is no string, or `overrides` is one.
        CheckpointError: weights that are damaged, of another model or of other classes.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be one of list_models(), not {name!r}")
    if isinstance(overrides, (str, Mapping)):
        raise TypeError(f'overrides must be a list such as ["model.num_classes=3"]: {overrides!r}')
    cfg = LazyConfig.apply_overrides(get_config(_known(name)), overrides)
    model: nn.Module = instantiate(cfg.model)
    if checkpoint is not None:
        load_model_weights(model, checkpoint, class_names=class_names, fine_tune=fine_tune)
    return model.to(device).eval()


def model_size(name: str, image_size: tuple[int, int] = (800, 1066)) -> ModelSize:
    """Count the parameters and the operations of a model, without computing anything.

    Convolutions, matrix products and deformable attention are counted, in the backbone, the
    transformer and the heads, without denoising queries.

    Args:
        name: one of `list_models()`.
        image_size: height and width of the image in pixels. The default is what the published
            test transform makes of a photograph of 640 x 480.

    Raises:
        ConfigError: no such model.
    """
    with torch.device("meta"):
        model = instantiate(get_config(_known(name)).model).eval()
        model.requires_grad_(False)  # torch's counter trips over parameters among the inputs
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if not hasattr(model, "forward_tensors"):
            return ModelSize(parameters, None)
        images = torch.empty(1, 3, *image_size)
        mask = torch.zeros(1, *image_size, dtype=torch.bool)
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with torch.no_grad(), counter:
        model.forward_tensors(images, mask)
    return ModelSize(parameters, counter.get_total_flops() // 2)


def _sampling_flops(weights: int, value: Sequence[int], *others: Any, **_: object) -> int:
    """Five multiply-adds per sample and channel: four corners and the weight.

    Zhu et al., "Deformable DETR", 2021, appendix A.1 (https://arxiv.org/abs/2010.04159).

    Args:
        weights: which of the others holds the samples' weights, or their logits.
        value, others: the shapes of the operator's arguments; value is (B, S, H, D).
    """
    return 2 * 5 * math.prod(others[weights]) * value[-1]


# For the argument custom_mapping of torch's FlopCounterMode, which counts a multiply-add twice.
FLOP_FORMULAS = {
    torch.ops.dn_detr.ms_deform_attn: partial(_sampling_flops, 3),
    torch.ops.dn_detr.ms_deform_attn_fused: partial(_sampling_flops, 4),
}


def _known(name: str) -> str:
    models = list_models()
    if name.removesuffix(".py") not in models:
        near = did_you_mean(name, models) or f"; there are {', '.join(models)}"
        raise ConfigError(f"the zoo has no model {name!r}{near}")
    return name.removesuffix(".py")
