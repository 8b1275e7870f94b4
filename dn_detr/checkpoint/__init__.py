"""Checkpoints: ours on disk, and those of other code bases through key maps."""

from .architecture import describe_backbone
from .backbones import read_backbone
from .conversion import TARGETS as LAYOUTS
from .conversion import convert_checkpoint
from .layouts import to_layout
from .manifest import CheckpointError, Manifest
from .reporting import log_loading
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
from .weights import LoadReport, load_model_weights, load_tensors, read_weights
from .writer import CheckpointWriter

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "CheckpointWriter",
    "LoadReport",
    "LoadedCheckpoint",
    "Manifest",
    "NonFiniteWeightsError",
    "Snapshot",
    "best_manifest",
    "convert_checkpoint",
    "describe_backbone",
    "find_checkpoint",
    "last_checkpoint",
    "load_checkpoint",
    "load_last_checkpoint",
    "load_model_weights",
    "load_tensors",
    "log_loading",
    "read_backbone",
    "read_manifest",
    "read_weights",
    "record_metrics",
    "save_weights",
    "to_layout",
]
