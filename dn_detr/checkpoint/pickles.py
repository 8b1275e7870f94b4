"""Reading pickles without executing anything that they hold."""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .manifest import CheckpointError

_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # its magic number, pickled
_ZIP = b"PK\x03\x04"
_REFUSED = re.compile(r"(?:GLOBAL|class|instance) `?([\w.]+\.[\w.]+)")


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in protocol 2, which Python 2 and 3 write in this way."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]  # numpy hides the two under changing names
_SCALAR: Any = np.float64(0).__reduce__()[0]
_NUMPY_FUNCTIONS = [
    (function, f"numpy.{core}.multiarray", name)
    for core in ("core", "_core")
    for function, name in ((_RECONSTRUCT, "_reconstruct"), (_SCALAR, "scalar"))
]
_ARRAY_CLASSES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(module, name): function for function, module, name in _NUMPY_FUNCTIONS},
}
# What the training scripts of the published models put beside the weights. Paths become pure
# ones, which cannot touch the file system.
_BESIDE_WEIGHTS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *((function, f"{module}.{name}") for function, module, name in _NUMPY_FUNCTIONS),
    *{type(np.dtype(code)) for code in ("?", *np.typecodes["AllInteger"], *"efd", "U", "S")},
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and containers, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_CLASSES[module, name]
        except KeyError:
            raise RefusedClass(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


class RefusedClass(Exception):
    """A pickle asks for a class or function that is not on the list of harmless ones."""


def read_pickle(path: Path, *, mmap: bool = True) -> Any:
    """Read a file of torch (zip or legacy format) or a pickle of numpy arrays.

    Args:
        path: the file.
        mmap: tensors of a zip file stay on the disk until they are used.

    Raises:
        CheckpointError: damaged, or asks for a class that may not be loaded; nothing was executed.
    """
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
        file.seek(0)
        try:
            if start.startswith(_ZIP):
                _check_archive(path)
                return _read_torch(path, mmap=mmap)
            if start == _LEGACY_TORCH:
                return _read_torch(path, mmap=False)
            return _read_arrays(file)
        except RefusedClass as refused:
            raise CheckpointError(
                f"{path}: asks for {refused}, which may not be loaded from a file because it could "
                "run code; nothing was executed. Where you trust it, let its own program save the "
                "weights alone: torch.save(model.state_dict(), FILE)"
            ) from None
        except CheckpointError:
            raise
        # A damaged pickle can raise anything; in any case the file is the cause.
        except Exception as error:
            raise CheckpointError(
                f"{path}: damaged or truncated ({path.stat().st_size} bytes), it cannot be read: "
                f"{_first_line(error)}; download or copy it again"
            ) from error


def _check_archive(path: Path) -> None:
    """Raise CheckpointError if a zip archive is not one of `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name for name in archive.namelist()}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript archive, which is a program; save the weights alone with "
            "torch.save(model.state_dict(), FILE)"
        )
    if "data.pkl" not in names:
        some = ", ".join(sorted(names)[:5])
        raise CheckpointError(f"{path}: a zip archive, but not one of torch: it holds {some}")


def _read_torch(path: Path, *, mmap: bool) -> Any:
    with torch.serialization.safe_globals(_BESIDE_WEIGHTS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if "nsupported" in str(error) or "llowed" in str(error):
                match = _REFUSED.search(str(error))
                raise RefusedClass(match[1] if match else _first_line(error)) from None
            raise


def _read_arrays(file: BinaryIO) -> Any:
    return _ArrayUnpickler(file, encoding="latin1").load()


def _first_line(error: BaseException) -> str:
    # Torch's message begins with the advice to run the file's code; its reason comes after that.
    text = str(error).split("WeightsUnpickler error:")[-1]
    lines = text.strip().splitlines()
    return lines[0] if lines else repr(error)
