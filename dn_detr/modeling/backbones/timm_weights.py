"""Weights for networks of timm, from its downloads or from a file.

timm's own loading maps foreign layouts to its names; it is used for the whole classification
network, where it is strict, and the backbone takes its part from there.
"""

from __future__ import annotations

import logging
import pickle
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

_PRETRAINED = "pretrained"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_logger = logging.getLogger(__name__)


def import_timm() -> ModuleType:
    """The package timm, which this library needs for nothing else.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "backbones other than ResNet come from timm, which is not installed: pip install timm"
        ) from error
    return timm


def load_weights(body: nn.Module, name: str, weights: str, arguments: Mapping[str, Any]) -> bool:
    """Fill a `features_only` network.

    Args:
        body: the network.
        name: timm's name of it.
        weights: `pretrained`, or a file.
        arguments: with which the network was built.

    Returns:
        False if the weights are to be downloaded and out of reach; a warning was logged.

    Raises:
        ValueError: see `TimmBackbone.load_pretrained`.
    """
    timm = import_timm()
    source: dict[str, Any] = {}
    if weights != _PRETRAINED:
        state = _read_file(weights)
        classes = _count_classes(state, timm.get_pretrained_cfg(name).classifier)
        source = dict(state_dict=state, num_classes=classes, label_offset=0)
    try:
        network = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=source, **arguments
        )
    except OSError as error:  # no network, or a cache that cannot be written
        _logger.warning(
            "THE BACKBONE STARTS FROM RANDOM WEIGHTS: timm's weights of %s could not be fetched "
            "(%s). For a real training fetch them on a machine with network, or name a file with "
            "model.backbone.weights=FILE.",
            name,
            error,
        )
        return False
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:  # what its filters raise
        reason = textwrap.shorten(str(error), 600)  # it lists every tensor
        raise ValueError(f"backbone weights {weights!r} do not fit {name}: {reason}") from error
    _copy_common(body, network.state_dict(), f"backbone weights {weights!r}")
    if weights == _PRETRAINED:
        _check_normalisation(name, network.pretrained_cfg)
    return True


def _read_file(path: str) -> dict[str, Tensor]:
    """A state_dict; nothing in the file is executed."""
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise ValueError(f"backbone weights {path!r}: no such file, and not {_PRETRAINED!r}")
    try:
        state = load_state_dict(path, weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise ValueError(
            f"backbone weights {path!r}: not a file of tensors that torch can read safely"
        ) from error
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"backbone weights {path!r}: holds no state_dict")
    return state


def _count_classes(state: Mapping[str, Tensor], classifier: Any) -> int:
    """Rows of the classifier in a file, under timm's or the original name; 0 if it has none."""
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    for name in [*names, *(name.partition(".")[0] for name in names)]:
        if f"{name}.weight" in state:
            return len(state[f"{name}.weight"])
    return 0


def _copy_common(body: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy every tensor of `body` from the whole network, whose names differ by a prefix."""
    spellings = {
        spelling: tensor
        for name, tensor in state.items()
        for spelling in (name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}")
    }
    own = [name for name in body.state_dict() if not name.endswith("num_batches_tracked")]
    missing = [name for name in own if name not in spellings]
    if missing:
        raise ValueError(f"{what}: {len(missing)} tensors are missing {missing[:3]}")
    body.load_state_dict({name: spellings[name] for name in own}, strict=False)


def _check_normalisation(name: str, pretrained: Mapping[str, Any]) -> None:
    """Say so if the weights want other pixels than the configs give by default."""
    mean, std = pretrained["mean"], pretrained["std"]
    if (tuple(mean), tuple(std)) != _IMAGENET:
        _logger.warning(
            "the weights of %s were trained with another normalisation: set model.pixel_mean=%s "
            "model.pixel_std=%s",
            name,
            [round(255 * m, 3) for m in mean],
            [round(255 * s, 3) for s in std],
        )
