"""Weights files with mutated opcodes, archives and headers, read and loaded into a small model.

python -m tests.fuzz.weights --seconds 600
python -m tests.fuzz.weights --seed 7
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dn_detr.checkpoint import (
    Detectron2Layout,
    DetrexLayout,
    HuggingFaceLayout,
    OfficialLayout,
    TorchvisionLayout,
    load_model_weights,
    read_weights,
)
from tests.fuzz.driver import CANARY, main

INTEGERS = (0, 1, -1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1)
NAMES = (
    f"{CANARY} called", "os system", "builtins eval", "builtins getattr", "builtins exec",
    "posix system", "nt system", "subprocess Popen", "importlib import_module", "pickle loads",
    "numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy fromfile",
    "numpy._core.multiarray scalar", "numpy memmap", "numpy._core.numeric _frombuffer",
    "collections OrderedDict", "collections defaultdict", "collections Counter", "torch load",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch FloatStorage",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_nested_tensor", "torch Size",
    "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch DoubleStorage",
    "torch.storage UntypedStorage", "torch.storage _load_from_bytes", "torch BoolStorage",
    "argparse Namespace", "_codecs encode", "pathlib PosixPath", "torch int64", "torch device",
)  # fmt: skip
OPCODES = [each.code.encode("latin1") for each in pickletools.opcodes]


class Model(nn.Module):
    """A few tensors of a detector, which knows every layout."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.key_maps = [
            OfficialLayout(), DetrexLayout(), HuggingFaceLayout(), TorchvisionLayout(),
            Detectron2Layout(),
        ]  # fmt: skip
        self.heads = nn.ModuleDict({"class_embed": nn.ModuleList([nn.Linear(4, 3)])})
        self.queries = nn.ModuleDict({"anchors": nn.Embedding(5, 4)})

    def class_tensors(self) -> list[str]:
        return ["heads.class_embed.0.weight", "heads.class_embed.0.bias"]


def weights() -> dict[str, Tensor]:
    return {
        "class_embed.0.weight": torch.rand(5, 4),
        "class_embed.0.bias": torch.rand(5),
        "refpoint_embed.weight": torch.rand(5, 4),
    }


@cache
def originals() -> dict[str, bytes]:
    """A good file of each kind."""
    beside = {"epoch": 3, "args": argparse.Namespace(lr=0.1, names=["a"], path=Path("x"))}
    content = {"model": OrderedDict(weights()), "class_names": list("abcde"), **beside}
    arrays = {"model": {n: v.numpy() for n, v in weights().items()}, "best": np.float64(1.0)}
    made = {"safetensors": safetensors.torch.save(weights())}
    for kind, is_zip in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
        made[kind] = buffer.getvalue()
    return {**made, **{f"pkl{n}": pickle.dumps(arrays, protocol=n) for n in (2, 3, 4)}}


# ---- mutations ----------------------------------------------------------------------------------


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, insert, repeat, remove or cut."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place, length = rng.randrange(len(changed) + 1), rng.choice([1, 1, 2, 4, 8, 64, 1000])
        part = changed[place : place + length]
        new: bytes = rng.choice([
            rng.randbytes(len(part)), part * 2, b"", bytes(len(part)), b"\xff" * len(part),
            struct.pack("<q", rng.choice(INTEGERS)), rng.choice(NAMES).encode(),
        ])  # fmt: skip
        changed[place : place + length] = new
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.1 else changed)


def mutated_pickle(rng: random.Random, data: bytes) -> bytes:
    """Change opcodes and their arguments; what comes after the pickle stays."""
    try:
        places = [place for _, _, place in pickletools.genops(data)]
    except Exception:
        return mutated_bytes(rng, data)
    end = places[-1] + 1
    ops = [data[a:b] for a, b in zip(places, [*places[1:], end], strict=True)]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(ops))
        kind = rng.randrange(7)
        if kind == 0:
            ops[at] = b""
        elif kind == 1:
            ops.insert(at, rng.choice(ops))
        elif kind == 2:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        elif kind == 3:
            ops[at] = opcode(rng)
        elif kind == 4:
            globals_ = [i for i, op in enumerate(ops) if op.startswith(b"c")]
            ops[rng.choice(globals_ or [at])] = named(rng)
        elif kind == 5:
            ops[at:at] = [opcode(rng) for _ in range(rng.choice([1, 3, 10]))]
        else:
            numbers = [i for i, op in enumerate(ops) if op[:1] in b"KMJ\x8a"]
            ops[rng.choice(numbers or [at])] = number(rng)
        ops = [op for op in ops if op] or [b"."]
    return b"".join(ops) + data[end:]


def opcode(rng: random.Random) -> bytes:
    """A random opcode with some argument."""
    kind = rng.random()
    if kind < 0.25:
        return named(rng)
    if kind < 0.5:
        return number(rng)
    if kind < 0.7:
        return rng.choice([b"h", b"q"]) + bytes([rng.randrange(20)])
    argument = rng.choice([b"", bytes([rng.randrange(256)]), rng.randbytes(4), b"abc\n", b"\0" * 8])
    if kind < 0.8:
        argument = struct.pack("<q", rng.choice(INTEGERS))
    return rng.choice(OPCODES) + argument


def named(rng: random.Random) -> bytes:
    return b"c" + rng.choice(NAMES).replace(" ", "\n").encode() + b"\n"


def number(rng: random.Random) -> bytes:
    return b"\x8a\x09" + rng.choice(INTEGERS).to_bytes(9, "little", signed=True)


def mutated_zip(rng: random.Random, data: bytes) -> bytes:
    """Change the pickle of an archive of torch, its other records, and how they are stored."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            if name.endswith("data.pkl") and rng.random() < 0.8:
                record = mutated_pickle(rng, record)
            elif rng.random() < 0.03:
                record = rng.choice([b"", record[:-3], record * 2, mutated_bytes(rng, record)])
            if rng.random() < 0.03:
                record += bytes(rng.choice([10**4, 10**6]))
            if rng.random() < 0.01:
                name = rng.choice([name + "x", "../" + name, "data.pkl", "constants.pkl", "/a"])
            info = zipfile.ZipInfo(name)
            start = buffer.tell() + 30 + len(name.encode()) + 4
            padding = -start % 64 if rng.random() < 0.99 else rng.randrange(64)
            info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
            is_deflated = rng.random() < 0.005
            kind = zipfile.ZIP_DEFLATED if is_deflated else zipfile.ZIP_STORED
            new.writestr(info, record, kind)
    return mutated_bytes(rng, buffer.getvalue()) if rng.random() < 0.1 else buffer.getvalue()


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header: its length, names, dtypes, shapes and offsets."""
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice([1, 1, 2, 5])):
        entry = header[rng.choice(list(header))]
        numbers = [rng.choice(INTEGERS) for _ in range(rng.choice([0, 1, 2, 2, 3, 100]))]
        key = rng.choice(["dtype", "shape", "data_offsets", "name", "none"])
        if key == "name":
            header[rng.choice(["a" * 10**5, "module." * 999 + "x", "", "\x1b[2J"])] = dict(entry)
        elif key == "none":
            entry.pop(rng.choice(list(entry)), None) if entry else None
        else:
            types = ("F64", "BF16", "I8", "BOOL", "U64", "F8_E4M3", "X", "", None, 7)
            entry[key] = rng.choice(types) if key == "dtype" else numbers
    text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = mutated_bytes(rng, text)
    if rng.random() < 0.05:
        text = b"[" * 10**5
    count = rng.choice(INTEGERS) % 2**64 if rng.random() < 0.1 else len(text)
    return struct.pack("<Q", count) + text + values


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "zip": mutated_zip,
    "safetensors": mutated_safetensors,
}


def write(rng: random.Random, folder: Path) -> Path:
    """Write the file of a seed, alone or as a folder of transformers."""
    torch.manual_seed(0)
    kind = rng.choice(["zip", "zip", "legacy", "pkl2", "pkl3", "pkl4", "safetensors"])
    mutate = MUTATIONS.get(kind, mutated_pickle)
    data = (mutated_bytes if rng.random() < 0.1 else mutate)(rng, originals()[kind])
    is_folder = rng.random() < 0.1
    suffix = "safetensors" if kind == "safetensors" else "bin"
    file = folder / (f"model.{suffix}" if suffix != "bin" else "pytorch_model.bin")
    if is_folder:
        labels = json.dumps({"id2label": {str(i): "x" for i in range(5)}}).encode()
        (folder / "config.json").write_bytes(mutated_bytes(rng, labels))
    file.write_bytes(data)
    return folder if is_folder else file


def read(path: Path) -> None:
    """Read the weights, look at each number, and load them."""
    for value in read_weights(path).values():
        value.sum()
    load_model_weights(Model(), path, class_names=["a", "x", "c"], fine_tune=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Duplicate name")
    main("weights", write, read)
