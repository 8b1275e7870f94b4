"""Time and memory of loading a full R50 checkpoint of every layout.

    python benchmarks/load_checkpoint.py --json load_checkpoint.json

Each layout is written to a temporary folder and loaded in a process of its own, whose model exists
before the clock starts. Columns: reading the bytes of the file; loading it into the model, reading
included; the peak of memory during loading beyond what the process held before (the model), over
the size of the file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dn_detr.checkpoint import (
    DetrexLayout,
    HuggingFaceLayout,
    OfficialLayout,
    load_model_weights,
    save_weights,
)
from dn_detr.config import get_config, instantiate

CONFIG = "models/dn_deformable_detr_r50.py"
State = dict[str, torch.Tensor]


def _ours(state: State, folder: Path) -> Path:
    return save_weights(folder / "ours", state)


def _safetensors(state: State, folder: Path) -> Path:
    save_file({name: value.clone() for name, value in state.items()}, folder / "f.safetensors")
    return folder / "f.safetensors"


def _official(state: State, folder: Path) -> Path:
    return _saved({"model": OfficialLayout().to_theirs(state)}, folder / "official.pth")


def _official_with_optimizer(state: State, folder: Path) -> Path:
    moments = {i: {"exp_avg": v, "exp_avg_sq": v + 1} for i, v in enumerate(state.values())}
    content = {
        "model": OfficialLayout().to_theirs(state),
        "optimizer": {"state": moments},
        "args": argparse.Namespace(lr=1e-4),
    }
    return _saved(content, folder / "training.pth")


def _detrex(state: State, folder: Path) -> Path:
    return _saved({"model": DetrexLayout().to_theirs(state)}, folder / "detrex.pth")


def _detrex_before_zip(state: State, folder: Path) -> Path:
    return _saved({"model": DetrexLayout().to_theirs(state)}, folder / "legacy.pth", zipped=False)


def _arrays(state: State, folder: Path) -> Path:
    arrays = {name: value.numpy() for name, value in DetrexLayout().to_theirs(state).items()}
    path = folder / "arrays.pkl"
    path.write_bytes(pickle.dumps({"model": arrays}, protocol=2))
    return path


def _huggingface(state: State, folder: Path) -> Path:
    """As transformers stores it, with query, key and value apart."""
    folder = folder / "huggingface"
    folder.mkdir()
    result = {}
    for name, value in HuggingFaceLayout().to_theirs(state).items():
        name = name.replace("backbone.body.", "backbone.conv_encoder.model._backbone.")
        name = name if name.startswith(("class_embed", "bbox_embed")) else f"model.{name}"
        if ".in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[name.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        else:
            result[name] = value.clone()
    save_file(result, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _saved(content: dict[str, Any], path: Path, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


LAYOUTS: dict[str, Callable[[State, Path], Path]] = {
    "ours": _ours,
    "safetensors": _safetensors,
    "official": _official,
    "official with optimizer": _official_with_optimizer,
    "detrex": _detrex,
    "detrex, legacy format": _detrex_before_zip,
    "detrex, pickled arrays": _arrays,
    "huggingface": _huggingface,
}


def measure(path: Path) -> dict[str, float]:
    """Load once into a new model, in a process of its own."""
    model = instantiate(_config())
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    started = time.perf_counter()
    size = sum(len(file.read_bytes()) for file in files)
    read = time.perf_counter() - started
    _reset_peak()
    before = _memory("VmRSS")
    started, cpu_started = time.perf_counter(), time.process_time()
    load_model_weights(model, path)
    load, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    peak = _memory("VmHWM")
    return {
        "file_mib": size / 2**20,
        "read_s": read,
        "load_s": load,
        "load_cpu_s": cpu,
        "held_mib": (peak - before) / 2**20,
        "held_over_file": (peak - before) / size,
    }


def _config() -> Any:
    cfg = get_config(CONFIG).model
    cfg.num_classes = 91
    return cfg


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def _row(name: str, state: State) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = LAYOUTS[name](state, Path(folder))
        with multiprocessing.get_context("forkserver").Pool(1) as pool:
            return {"layout": name, **pool.apply(measure, [path])}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file")
    arguments = parser.parse_args(argv)
    state = instantiate(_config()).state_dict()
    rows = []
    print(f"{'layout':<26}{'file MiB':>9}{'read s':>8}{'load s':>8}{'held MiB':>10}{'/ file':>8}")
    for name in LAYOUTS:
        row = _row(name, state)
        rows.append(row)
        print(
            f"{name:<26}{row['file_mib']:>9.0f}{row['read_s']:>8.2f}{row['load_s']:>8.2f}"
            f"{row['held_mib']:>10.0f}{row['held_over_file']:>8.2f}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["__main__"])
    main()
