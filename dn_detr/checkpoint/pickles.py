"""Reading files of torch and pickles of arrays without executing anything that they hold.

A pickle is a program. This module runs the part of its language that weights need, on objects that
are plain data: no class or function that a file names is ever reached, a stand-in takes its place.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from .manifest import CheckpointError

_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # its magic number, pickled
_ZIP = b"PK\x03\x04"
_NUMBERS = re.compile(r"[<>|=]?([fiu][248]|[iub]1)")  # dtypes of numpy whose bytes are numbers
_MEMORY = 1 << 27  # bytes that one pickle may take beside twice its size
_STEP = 100  # bytes that an opcode or an entry of a list is taken for; a tensor has 40 opcodes
_MOST_DIMENSIONS = 8
_DIRECTORY = 1 << 23  # bytes at the end of an archive in which its records are counted
_MOST_RECORDS = 50_000
_MOST_KEPT = 1 << 16  # bytes of a text that a pickle refers to again
_SHOWN = 200  # characters of what a file says, in a message


class RefusedClass(Exception):
    """A pickle asks for a class or function that is not on the list of harmless ones."""


class Beside:
    """Stands for what lies beside the weights: settings, paths, single numbers."""

    def __init__(self, *_: object) -> None: ...

    def build(self, state: Any) -> None:
        """Take the state of the object that this stands for."""


class ArrayType(Beside):
    """Stands for a dtype of numpy."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code if _NUMBERS.fullmatch(code) else ""

    def build(self, state: Any) -> None:
        """Take the byte order, which is the second entry."""
        if self.code and state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>|=")


class Array(Beside):
    """Stands for an array of numpy.

    Attributes:
        tensor: its numbers, in memory of their own; None if its entries are no numbers.
    """

    tensor: Tensor | None = None

    def build(self, state: Any) -> None:
        """Take the numbers: (version, shape, dtype, is Fortran's order, bytes)."""
        _, shape, dtype, is_fortran, raw = state
        if dtype.code:
            # a pickle of Python 2 holds its bytes as a string
            data = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.code)
            array = data.reshape(shape, order="F" if is_fortran else "C")
            native = array.dtype.newbyteorder("=")
            self.tensor = torch.from_numpy(array.astype(native, order="C", copy=True))


def _tensor(values: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    """A view of a storage, given as its values, that shows none of them several times."""
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor with a shape that is none")
    if len(size) > _MOST_DIMENSIONS or math.prod(size) > values.numel():
        raise ValueError("a tensor of more numbers than are stored")
    return values.as_strided(size, stride, offset)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in protocol 2, which Python 2 and 3 write in this way."""
    if encoding != "latin1":
        raise ValueError("encoding '" + encoding + "'")
    return text.encode("latin1")


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in pairs:
        _fill(made, [key, value])
    return made


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "numpy.dtype": ArrayType,
    "numpy.ndarray": Beside,  # an argument of the next
    "numpy.core.multiarray._reconstruct": lambda *_: Array(),
    "numpy._core.multiarray._reconstruct": lambda *_: Array(),
    # What the training scripts of the published models put beside the weights
    "numpy.core.multiarray.scalar": Beside,
    "numpy._core.multiarray.scalar": Beside,
    "argparse.Namespace": Beside,
    "collections.Counter": Beside,
    "pathlib.PosixPath": Beside,
    "pathlib._local.PosixPath": Beside,
    "torch.Size": Beside,
    "torch.device": Beside,
}
_LARGE = object()  # in the place of what is not kept
_CALLABLE = frozenset(_CALLS.values())
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
_NAMES = {
    **_CALLS,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
}
_LITERAL = "INT|LONG[14]?|FLOAT|UNICODE|STRING|BININT[12]?|BINFLOAT|.*BIN(STRING|BYTES|UNICODE)8?"
_LITERALS = {each.name for each in pickletools.opcodes if re.fullmatch(_LITERAL, each.name)}
_TAKING = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "REDUCE": 2, "NEWOBJ": 2,
    "BUILD": 1, "BINPERSID": 1, "STACK_GLOBAL": 2, "STOP": 1,
}  # fmt: skip
_TAKING_TO_MARK = ("TUPLE", "APPENDS", "ADDITEMS", "SETITEMS")
_COPYING = ("REDUCE", "NEWOBJ", "BUILD", "BINPERSID")  # the last that they take
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip


def read_pickle(path: Path, *, mmap: bool = True) -> Any:
    """Read a file of torch (zip or legacy format) or a pickle of numpy arrays.

    Args:
        path: the file.
        mmap: tensors of a zip file stay on the disk until they are used.

    Returns:
        Dicts, lists, tuples, strings, numbers and tensors; sets are lists, arrays of numpy are
        `Array`, and the other objects that may lie beside weights are `Beside`.

    Raises:
        CheckpointError: damaged, or asks for a class that may not be loaded; nothing was executed.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY_TORCH))
            file.seek(0)
            if start.startswith(_ZIP):
                return _read_zip(path, file, mmap=mmap)
            return _read_legacy(file, size) if start == _LEGACY_TORCH else _run(file)
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
            f"{path}: damaged or truncated ({size} bytes), it cannot be read: "
            f"{repr(error)[:_SHOWN]}; download or copy it again"
        ) from error


def _read_zip(path: Path, file: BinaryIO, *, mmap: bool) -> Any:
    file.seek(-min(_DIRECTORY, path.stat().st_size), io.SEEK_END)
    if file.read().count(b"PK\1\2") > _MOST_RECORDS:  # each takes half a kilobyte of memory
        raise ValueError(f"an archive of more than {_MOST_RECORDS} records")
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        names = {Path(name).name: name for name in records}
        if "constants.pkl" in names:
            raise CheckpointError(
                f"{path}: a TorchScript archive, which is a program; save the weights alone with "
                "torch.save(model.state_dict(), FILE)"
            )
        if "data.pkl" not in names:
            some = ascii(", ".join(sorted(names)[:5]))[1:-1]
            raise CheckpointError(
                f"{path}: a zip archive, but not one of torch: it holds {some[:_SHOWN]}"
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            raise CheckpointError(
                f"{path}: a compressed archive, which torch.save does not write; unpack it and "
                "save the weights again"
            )
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise CheckpointError(f"{path}: of a machine with another byte order")
        root = names["data.pkl"].removesuffix("data.pkl")
        whole = UntypedStorage.from_file(str(path), False, path.stat().st_size)
        whole = whole if mmap else whole.clone()

        def stored(dtype: torch.dtype, key: str, count: int) -> Tensor:
            info = records[f"{root}data/{key}"]
            file.seek(info.header_offset + 26)  # the lengths of a name and of what follows it
            lengths = file.read(4)
            start = file.tell() + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            data = whole[start : start + count * dtype.itemsize]
            if len(data) != count * dtype.itemsize or len(data) > info.file_size:
                raise ValueError(f"{key} holds less than {count} numbers")
            if start % dtype.itemsize:
                raise ValueError(f"{key} is not aligned, as torch.save does it")
            return torch.empty(0, dtype=dtype).set_(data)

        return _run(io.BytesIO(archive.read(names["data.pkl"])), stored)


def _read_legacy(file: BinaryIO, size: int) -> Any:
    _, _, system = _run(file), _run(file), _run(file)  # magic number, protocol
    if not system["little_endian"]:
        raise ValueError("of a machine with another byte order")
    storages: dict[str, Tensor] = {}
    free = size

    def announced(dtype: torch.dtype, key: str, count: int) -> Tensor:
        nonlocal free
        if key not in storages:
            free -= count * dtype.itemsize
            if free < 0:
                raise ValueError("more numbers than the file has bytes")
            storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    content = _run(file, announced)
    for key in _run(file):
        values = storages[key if isinstance(key, str) else ""]
        count, data = int.from_bytes(file.read(8), "little"), file.read(values.nbytes)
        if count != values.numel() or len(data) != values.nbytes:
            raise ValueError(f"{key} holds another count of numbers")
        if count:
            values.copy_(torch.frombuffer(bytearray(data), dtype=values.dtype))
    return content


def _run(file: BinaryIO, stored: Callable[[torch.dtype, str, int], Tensor] | None = None) -> Any:
    """Run a pickle up to its end.

    Args:
        file: where it begins.
        stored: (dtype, key, count) of a storage -> its values (count,).

    Raises:
        RefusedClass: it asks for a class or function that it must not have.
        Exception: any other, if it is damaged.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}
    value: Any
    start = file.tell()
    left = 2 * file.seek(0, io.SEEK_END) + _MEMORY
    file.seek(start)
    for opcode, value, _ in pickletools.genops(file):
        name = opcode.name
        if name in _TAKING_TO_MARK:
            items, stack = stack, below.pop()
        else:
            count = _TAKING.get(name, 0)
            items = stack[len(stack) - count :]
            del stack[len(stack) - count :]
        left -= _cost(items[-1]) if name in _COPYING else _STEP
        if left < 0:
            raise ValueError("more objects than any model has, or one too often")
        match name:
            case _ if name in _LITERALS:
                stack.append(value)
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS" | "ADDITEMS" | "SETITEM" | "SETITEMS":
                _fill(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                # Not the bytes of an array, nor their tuple: they would fill the memory twice.
                parts = stack[-1][:8] if isinstance(stack[-1], tuple) else stack[-1:]
                is_large = any(isinstance(x, bytes | str) and len(x) > _MOST_KEPT for x in parts)
                memo[len(memo) if value is None else value] = _LARGE if is_large else stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                if memo[value] is _LARGE:
                    raise ValueError(f"it refers again to a text of more than {_MOST_KEPT} bytes")
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_named(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*items))
            case "REDUCE" | "NEWOBJ":
                function, arguments = items
                # To hash or print a tuple of tuples may take for ever.
                if (
                    not callable(function)
                    or function not in _CALLABLE
                    or type(arguments) is not tuple
                ):
                    raise ValueError("it calls what is no function")
                stack.append(function(*arguments))
            case "BUILD":
                if isinstance(stack[-1], Beside):
                    stack[-1].build(items[0])
            case "BINPERSID" if stored is not None:
                kind, dtype, key, _, count, *view = items[0]
                if kind != "storage" or any(view) or type(key) is not str or type(count) is not int:
                    raise ValueError("it refers to objects outside of itself")
                stack.append(stored(dtype, key, count))
            case "STOP":
                return items[0]
            case _:
                raise ValueError(f"weights need no {name}")
    raise ValueError("it does not end")


def _named(module: str, name: str) -> Any:
    """The stand-in for a class, function or dtype."""
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is no text")
    full = f"{module}.{name}"
    if full not in _NAMES:
        raise RefusedClass(ascii(full)[1:-1][:_SHOWN])
    return _NAMES[full]


def _cost(given: Any) -> int:
    """About how many bytes a call takes: an object, and copies of what it is given."""
    parts = given if isinstance(given, tuple | list) else [given]
    return 10 * _STEP + sum(
        len(part) if isinstance(part, str | bytes)
        else _STEP * (len(part) if isinstance(part, tuple | list | dict) else 1)
        for part in parts
    )  # fmt: skip


def _fill(target: Any, items: list[Any]) -> None:
    """Append to a list, or set alternating keys and values of a dict, and of nothing else."""
    if type(target) is list:
        target.extend(items)
    elif type(target) is dict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples and large integers can be made to have the same hash, which takes for ever.
            is_small = isinstance(key, int) and -(2**63) <= key < 2**63
            if not (is_small or key is None or isinstance(key, str | float)):
                raise ValueError("a key that is neither a text nor a number")
            target[key] = value
    else:
        raise ValueError(f"it writes into an object of type {type(target).__name__}")
