"""Model weights from a file into a model, with one complete account of what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .manifest import MANIFEST_NAME, CheckpointError, Manifest
from .storage import MODEL_FILE, find_checkpoint

_LISTED = 10
_SUFFIX = ".safetensors"


def load_model_weights(
    model: nn.Module, path: str | Path, *, class_tensors: Collection[str] = ()
) -> list[str]:
    """Load every weight of `model` from a checkpoint; names and shapes must agree exactly.

    Args:
        model: the module to fill, on any device, not wrapped by DistributedDataParallel.
        path: a checkpoint folder, `.../checkpoints/last`, a run's output folder, or a
            `.safetensors` file.
        class_tensors: names of tensors with a row per class. If the checkpoint has another number
            of classes, all of them stay as they are in `model`.

    Returns:
        Names of the tensors that were not loaded.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one of another model; the message
            lists missing, unexpected and mis-shaped names.
    """
    weights = read_weights(path)
    expected = model.state_dict()
    kept = _of_other_classes(expected, weights, class_tensors)
    weights |= {name: expected[name] for name in kept}
    problems = _disagreements(expected, weights)
    if problems:
        raise CheckpointError(
            f"{path}: the weights of another model. {_summary(weights)}\n"
            + "\n".join(problems)
            + "\nUse the config that the checkpoint was trained with (its manifest.json holds it)."
        )
    model.load_state_dict(weights)
    return kept


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read name -> tensor (CPU), verified against the manifest where there is one.

    Args:
        path: as for `load_model_weights`.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
    """
    file = _weights_file(Path(path))
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or not a safetensors file: {error}") from error


def _weights_file(path: Path) -> Path:
    if path.is_file() and path.suffix != _SUFFIX:
        raise CheckpointError(
            f"{path}: not a checkpoint of dn_detr; expected a checkpoint folder, an output folder "
            f"or a {_SUFFIX} file"
        )
    if not path.is_file():
        folder = find_checkpoint(path)
        return Manifest.read(folder).verify(folder, MODEL_FILE)
    if path.name == MODEL_FILE and (path.parent / MANIFEST_NAME).is_file():
        return Manifest.read(path.parent).verify(path.parent, MODEL_FILE)
    return path


def _of_other_classes(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], class_tensors: Collection[str]
) -> list[str]:
    """The class tensors, if the file has another number of rows in one of them; else none."""
    comparable = [
        name
        for name in class_tensors
        if name in found and found[name].shape[1:] == expected[name].shape[1:]
    ]
    differ = any(len(found[name]) != len(expected[name]) for name in comparable)
    return comparable if differ else []


def _disagreements(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} (file {tuple(found[name].shape)}, model {tuple(value.shape)})"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    return [
        *_listing("missing from the file", missing),
        *_listing("unexpected in the file", unexpected),
        *_listing("of another shape", misshapen),
    ]


def _listing(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    rest = [f"  ... and {len(entries) - _LISTED} more"] if len(entries) > _LISTED else []
    return [f"{len(entries)} {title}:", *(f"  {entry}" for entry in entries[:_LISTED]), *rest]


def _summary(weights: Mapping[str, Tensor]) -> str:
    """Say what a file looks like: how many tensors under which modules."""
    modules = Counter(name.split(".")[0] for name in weights)
    parts = ", ".join(f"{module} ({count})" for module, count in modules.most_common(_LISTED))
    return f"The file holds {len(weights)} tensors: {parts}."
