"""The weights of a ResNet out of any file that holds one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .account import check_finite
from .files import read_file
from .manifest import CheckpointError
from .weights import translate

_BODY = "backbone.body."


def read_backbone(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a backbone under torchvision's names.

    Args:
        path: a ResNet of torchvision (``.pth``) or detectron2 (``.pkl``), or a detector of ours,
            of the authors' code, of detrex or of transformers.

    Returns:
        ``conv1.weight``, ``bn1.running_mean``, ``layer1.0.conv1.weight``, ... -> tensor (CPU);
        without classifier and counters.

    Raises:
        CheckpointError: no such file, a damaged one, or none with a backbone in it.
    """
    translation = translate(read_file(path).tensors, str(path))
    translation.tensors = {
        name: value
        for name, value in translation.tensors.items()
        if name.startswith(_BODY) and not name.endswith("num_batches_tracked")
    }
    if not translation.tensors:
        some = ", ".join(translation.unknown[:10])
        raise CheckpointError(f"{path}: holds no backbone; unknown names: {some}")
    check_finite(translation, str(path))
    return {name.removeprefix(_BODY): value for name, value in translation.tensors.items()}
