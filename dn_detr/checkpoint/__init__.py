"""Checkpoints: ours on disk, and those of other code bases through layouts."""

from .conversion import convert_checkpoint
from .layouts import (
    Detectron2Layout,
    DetrexLayout,
    HuggingFaceLayout,
    Layout,
    OfficialLayout,
    TorchvisionLayout,
    as_layouts,
)
from .manifest import CheckpointError, Manifest
from .snapshot import NonFiniteWeightsError, Snapshot
from .storage import (
    LoadedCheckpoint,
    best_manifest,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    load_last_checkpoint,
    read_manifest,
    record_metrics,
    save_weights,
)
from .weights import (
    LoadReport,
    load_backbone,
    load_model_weights,
    load_tensors,
    log_loading,
    read_weights,
)
from .writer import CheckpointWriter

__all__ = [
    "CheckpointError",
    "CheckpointWriter",
    "Detectron2Layout",
    "DetrexLayout",
    "HuggingFaceLayout",
    "Layout",
    "LoadReport",
    "LoadedCheckpoint",
    "Manifest",
    "NonFiniteWeightsError",
    "OfficialLayout",
    "Snapshot",
    "TorchvisionLayout",
    "as_layouts",
    "best_manifest",
    "convert_checkpoint",
    "find_checkpoint",
    "last_checkpoint",
    "load_backbone",
    "load_checkpoint",
    "load_last_checkpoint",
    "load_model_weights",
    "load_tensors",
    "log_loading",
    "read_manifest",
    "read_weights",
    "record_metrics",
    "save_weights",
]
