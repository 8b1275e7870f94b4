"""Checkpoints: tensors in safetensors, training state beside them, a manifest with digests."""

from .manifest import CheckpointError, Manifest
from .storage import (
    find_checkpoint,
    last_checkpoint,
    load_training_state,
    read_manifest,
    record_metrics,
    save_checkpoint,
)
from .weights import load_model_weights, read_weights

__all__ = [
    "CheckpointError",
    "Manifest",
    "find_checkpoint",
    "last_checkpoint",
    "load_model_weights",
    "load_training_state",
    "read_manifest",
    "read_weights",
    "record_metrics",
    "save_checkpoint",
]
