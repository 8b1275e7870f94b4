"""Weights files made to read or write foreign memory, to run code or to fill the memory."""

from __future__ import annotations

import collections
import io
import os
import pickle
import resource
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dn_detr.checkpoint import CheckpointError, HuggingFaceLayout, load_tensors, read_weights
from dn_detr.checkpoint import pickles as reader
from dn_detr.checkpoint.class_rows import choose_rows
from tests.checkpoint.tiny_models import tiny_model

RECONSTRUCT = np.zeros(0).__reduce__()[0]
F8 = np.dtype("f8")
KINDS = ("pkl", "zip", "legacy")


class Made:
    """What a pickle makes by calling a function, and then fills.

    Args:
        function: as the pickle names it.
        arguments: of the call.
        state: for the opcode BUILD.
        entries: for the opcode SETITEM.
    """

    def __init__(
        self, function: Any, *arguments: Any, state: Any = None, entries: Any = None
    ) -> None:
        self.parts = (function, arguments, state, None)
        self.entries = entries

    def __reduce__(self) -> Any:
        return (*self.parts, self.entries and iter(self.entries))


def write(folder: Path, kind: str, content: Any) -> Path:
    """Write a file of weights of this kind."""
    file = folder / f"f.{kind}"
    if kind == "pkl":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    return file


def assert_refused(file: Path, message: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(file)
    assert len(str(error.value)) < 1500


def array_of(dtype: str, raw: bytes, count: int) -> Made:
    """An array that the pickle makes from bytes, of any dtype."""
    state = (1, (count,), np.dtype(dtype), False, raw)
    return Made(RECONSTRUCT, np.ndarray, (0,), b"b", state=state)


HOSTILE = {
    "negative offset": Made(np.ndarray, (4,), F8, b"x" * 64, -4096),
    "offset that overflows": Made(np.ndarray, (1,), F8, b"x" * 64, 2**63 - 8),
    "strides over the end": Made(np.ndarray, (4,), F8, b"x" * 64, 0, (2**40,)),
    "assignment into an array": Made(np.ndarray, (8,), F8, entries=[(0, 1337.0)]),
    "objects of raw bytes": Made(np.ndarray, (1,), np.dtype("O"), b"AAAAAA\0\0"),
    "objects by state": array_of("O", b"AAAAAA\0\0", 1),
    "records": array_of("f4,i4", bytes(8), 1),
    "dates": array_of("M8[s]", bytes(8), 1),
    "complex numbers": array_of("c16", bytes(16), 1),
    "dict of objects": Made(
        collections.OrderedDict, Made(np.ndarray, (1,), np.dtype("O"), b"AAAAAA\0\0")
    ),
    "too few bytes": array_of("f8", bytes(8), 2),
    "negative shape": Made(
        RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (-1, -1), F8, False, bytes(8))
    ),
    "dtype of a dict": Made(np.dtype, {"names": ["a"], "formats": ["O"]}),
    "memory map": Made(np.memmap, "/etc/passwd"),
    "file of numbers": Made(np.fromfile, "/etc/passwd"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HOSTILE)
def test_an_array_that_reaches_foreign_memory_is_refused(tmp_path, kind, case):
    good = {"a.weight": np.ones(2) if kind == "pkl" else torch.ones(2)}
    assert_refused(write(tmp_path, kind, {"model": {**good, "x": HOSTILE[case]}}))


def test_no_name_of_the_reader_leads_to_numpy_or_to_code():
    values = [value for value in reader._NAMES.values() if not isinstance(value, torch.dtype)]
    assert len(values) > 10 and {value.__module__ for value in values} == {reader.__name__}


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "=f8", "f2", ">i8", "u1", "?", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numbers_are_read_in_any_byte_order(tmp_path, dtype, order):
    values = np.array([[1, 0, 1], [0, 0, 1]], dtype=dtype)
    file = write(tmp_path, "pkl", {"w": np.asarray(values, order=order)})
    found = read_weights(file)["w"]
    assert found.is_contiguous() and found.tolist() == values.tolist()


def pickled(*parts: Any) -> bytes:
    """A pickle of opcodes, and of strings and numbers that are pushed."""
    data = b"\x80\x02"
    for part in parts:
        if isinstance(part, str):
            data += b"X" + struct.pack("<I", len(part)) + part.encode()
        elif isinstance(part, int):
            data += b"J" + struct.pack("<i", part)
        else:
            data += part
    return data + b"."


def test_an_array_of_python_2_is_read(tmp_path):
    raw = np.arange(3, dtype="f4").tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = (
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    state = b"(K\x01K\x03\x85" + dtype + b"\x89U" + bytes([len(raw)]) + raw + b"tb"
    (tmp_path / "f.pkl").write_bytes(pickled(b"}", "w", array, state, b"s"))
    assert read_weights(tmp_path / "f.pkl")["w"].tolist() == [0, 1, 2]


NESTED = b")" + b"\x85q\x00h\x00\x86" * 60  # a tuple of two of a tuple of two of ...
PROGRAMS = {
    "import of a module": pickled(b"ccanary_module\nfunction\n)R"),
    "call of a method": pickled(b"cbuiltins\ngetattr\n", "a", "b", b"\x86R"),
    "state of a function": pickled(b"ctorch._utils\n_rebuild_tensor_v2\n}", "__code__", 1, b"sb"),
    "state of a class": pickled(b"cargparse\nNamespace\n}", "__init__", 1, b"sb"),
    "key that is never hashed": pickled(b"}", NESTED, 1, b"s"),
    "integers of one hash": pickled(
        b"}(",
        b"".join(pickle.dumps(n * (2**61 - 1), protocol=2)[2:-1] + b"N" for n in range(1, 9000)),
        b"u",
    ),
    "key of 20000 digits": pickled(b"}\x8b", struct.pack("<i", 9000) + b"\x7f" * 9000, b"Ns"),
    "name that is never printed": pickled(b"c_codecs\nencode\n", "a", NESTED, b"\x86R"),
    "memo of 2**31 entries": pickled(b"}r\xff\xff\xff\x7f"),
    "string of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"a.",
    "bytes of 2**33": b"\x80\x04\x8e" + struct.pack("<Q", 2**33) + b"a.",
    "array of 2**33 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"a.",
    "frame of 2**60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "number of 20000 digits": b"\x80\x02I" + b"9" * 20_000 + b"\n.",
    "more lists than are believed": b"\x80\x02" + b"]" * 30_000 + b".",
    "extension": pickled(b"\x82\x01"),
    "reference to an object outside": pickled("x", b"Q"),
    "name of 5000 characters": pickled(b"ccanary_module\n" + b"\x1b[2J" * 1250 + b"\n)R"),
}


OFTEN = {
    "text that is encoded": pickled(
        b"c_codecs\nencode\nq\x00", "x" * 60_000, b"q\x01", "latin1", b"q\x02",
        b"h\x00h\x01h\x02\x86R" * 9000,
    ),
    "array of 40 kilobytes": pickled(
        b"cnumpy\ndtype\n", "f4", b"\x85Rq\x00(K\x01J\x10\x27\0\0\x85h\x00\x89T",
        struct.pack("<I", 40_000) + bytes(40_000) + b"tq\x01",
        b"cnumpy.core.multiarray\n_reconstruct\n)Rh\x01b" * 9000,
    ),
    "settings": pickled(b"cargparse\nNamespace\nq\x00", b"h\x00)R" * 150_000),
    "array of a list": pickled(
        b"]q\x00(K\x01J\xa0\x86\x01\0\x85cnumpy\ndtype\n", "u1", b"\x85R\x89T",
        struct.pack("<I", 100_000) + bytes(100_000) + b"e",
        b"cnumpy.core.multiarray\n_reconstruct\n)Rh\x00b" * 1500,
    ),
    "dict of pairs": pickled(
        b"ccollections\nOrderedDict\nq\x00](",
        b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(50_000)),
        b"e\x85q\x01", b"h\x00h\x01R" * 60,
    ),
    "dict of two letters": pickled(
        b"ccollections\nOrderedDict\nq\x00}(",
        b"".join(f"X\2\0\0\0{i:02x}N".encode() for i in range(256)) * 100,
        b"u\x85q\x01", b"h\x00h\x01R" * 6000,
    ),
    "settings with long arguments": pickled(
        b"cargparse\nNamespace\nq\x00(", b"N" * 100_000, b"tq\x01", b"h\x00h\x01R" * 30,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OFTEN)
def test_what_a_few_bytes_make_again_and_again_is_refused(tmp_path, case):
    (tmp_path / "f.pkl").write_bytes(OFTEN[case])
    assert_refused(tmp_path / "f.pkl", "one too often")


@pytest.fixture
def limited_memory():
    """Let an allocation of more than 3 GiB beyond what is used fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize("kind", ["pkl", "zip"])
@pytest.mark.parametrize("case", PROGRAMS)
def test_a_hostile_program_is_refused_in_no_time(tmp_path, monkeypatch, kind, case):
    monkeypatch.setattr(reader, "_MEMORY", 2_000_000)
    (tmp_path / "canary_module.py").write_text("raise SystemExit('the canary was called')")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"f.{kind}"
    file.write_bytes(PROGRAMS[case])
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("f/data.pkl", PROGRAMS[case])
    start = time.process_time()
    assert_refused(file)
    assert time.process_time() - start < 10
    assert "__code__" not in vars(reader._tensor) and reader.Beside("x")


def view(offset: Any, size: Any, stride: Any) -> Made:
    """A tensor that shows a storage of ten numbers in this way."""
    storage = torch.arange(10.0).storage()
    function = torch._utils._rebuild_tensor_v2
    return Made(function, storage, offset, size, stride, False, collections.OrderedDict())


VIEWS = {
    "before the storage": (-1, (2,), (1,)),
    "after the storage": (9, (2,), (1,)),
    "far after it": (2**62, (1,), (1,)),
    "negative stride": (9, (2,), (-1,)),
    "stride over the end": (0, (2,), (10,)),
    "size that overflows": (0, (2**62, 4), (4, 1)),
    "negative size": (0, (-1,), (1,)),
    "a number shown 10**9 times": (0, (10**9, 256), (0, 0)),
    "more sizes than strides": (0, (2, 2), (1,)),
    "a thousand dimensions": (0, (1,) * 1000, (1,) * 1000),
    "text for a size": (0, (10**9, "a"), (1, 1)),
}


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("case", VIEWS)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, kind, case):
    assert_refused(write(tmp_path, kind, {"model": {"x": view(*VIEWS[case])}}), "cannot be read")


OTHER_TENSORS = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("case", OTHER_TENSORS)
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path, kind, case):
    file = write(tmp_path, kind, {"model": {"x": OTHER_TENSORS[case]()}})
    assert_refused(file, "asks for torch.*may not be")


def test_a_storage_that_the_file_does_not_have_is_refused(tmp_path):
    file = write(tmp_path, "legacy", {"x": torch.ones(300)})
    data = file.read_bytes()
    count = b"M" + struct.pack("<H", 300)  # in the pickle: of the storage and of the tensor
    assert data.count(count) == 2
    file.write_bytes(data.replace(count, b"J" + struct.pack("<i", 2**30)))
    assert_refused(file, "more numbers than the file has bytes")


def test_a_storage_shown_under_thousands_of_names_is_refused(tmp_path):
    values = torch.zeros(100_000)
    weights = {f"layers.{i}.self_attn.q_proj.weight": values for i in range(100)}
    assert_refused(write(tmp_path, "zip", weights), "its tensors show 40000000 bytes")


def test_a_long_text_that_is_referred_to_again_is_refused(tmp_path):
    text = "x" * 100_000
    assert_refused(write(tmp_path, "pkl", {"model": {}, "log": [text, text]}), "refers again")


def test_an_archive_that_inflates_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f/data.pkl", bytes(2**26))
    start = time.process_time()
    assert_refused(tmp_path / "f.pth", "a compressed archive, which torch.save does not write")
    assert time.process_time() - start < 1


def test_an_archive_of_endless_records_is_not_listed(tmp_path):
    entry = b"PK\1\2" + bytes(24) + b"\x01" + bytes(17) + b"x"
    data = b"PK\3\4" + entry * 100_000
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, len(data) - 4, 4, 0)
    (tmp_path / "f.pth").write_bytes(data + end)
    assert_refused(tmp_path / "f.pth", "an archive of more than 50000 records")


def test_numbers_of_another_byte_order_are_refused(tmp_path):
    file = write(tmp_path, "zip", {"x": torch.ones(2)})
    data = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(data, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    file.write_bytes(data.getvalue())
    assert_refused(file, "another byte order")


def test_a_prefix_two_thousand_times_is_taken_off():
    source, model = tiny_model("dab_detr_r50"), tiny_model("dab_detr_r50", seed=1)
    load_tensors(model, {"module." * 2000 + k: v for k, v in source.state_dict().items()})
    assert torch.equal(model.queries.anchors.weight, source.queries.anchors.weight)


@pytest.mark.parametrize("name", ["x" * 100_000, "decoder.layers." + "9" * 5000 + ".x"])
def test_a_name_is_shortened(name):
    with pytest.raises(CheckpointError) as error:
        load_tensors(tiny_model("dab_detr_r50"), {name: torch.ones(1)})
    assert len(str(error.value)) < 5000


def test_class_names_are_shortened():
    with pytest.raises(CheckpointError) as error:
        choose_rows(1, 1, class_names=["a"], file_names=["\x1b[2J" * 10_000])
    assert len(str(error.value)) < 1000


def test_a_head_of_more_rows_than_there_are_classes_is_refused():
    with pytest.raises(CheckpointError, match="no detector's head"):
        choose_rows(3, 10**9, fine_tune=True)


@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
@pytest.mark.parametrize("place", ["config.json", "manifest.json"])
def test_what_is_no_file_is_not_read(tmp_path, kind, place):
    folder = tmp_path / "checkpoints" / "0000001"
    folder.mkdir(parents=True)
    file = folder / place
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as hole:
            hole.truncate(2**40)
    if place == "config.json":
        save_file({"a": torch.ones(2)}, folder / "w.safetensors")
        assert read_weights(folder / "w.safetensors")["a"].tolist() == [1, 1]
    assert_refused(folder)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_weights_that_are_no_file_are_refused(tmp_path, kind):
    file = tmp_path / "f.pth"
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    assert_refused(file, "neither a checkpoint folder")


def test_a_path_that_is_too_long_is_an_error_with_a_reason():
    assert_refused(Path("x" * 300), "cannot be read: File name too long")


_DOUBLED = b"\x80\x04)" + b"q\0h\0\x86" * 40  # a tuple of 2**40 empty ones


@pytest.mark.parametrize("end", [b")R.", b"X\x01\0\0\0x\x93."], ids=["called", "a module"])
def test_a_tuple_of_endless_tuples_is_neither_hashed_nor_printed(tmp_path, end):
    file = tmp_path / "f.pkl"
    file.write_bytes(_DOUBLED + end)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(file)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' + b" " * 2**22,
    ],
    ids=["a shape beyond 64 bits", "a huge header"],
)
def test_a_safetensors_header_that_no_file_has_is_refused(tmp_path, header):
    file = tmp_path / "f.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_weights(file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float4_e2m1fn_x2])
def test_numbers_with_which_nothing_can_be_computed_are_refused(tmp_path, dtype):
    file = tmp_path / "f.safetensors"
    save_file({"w": torch.zeros(4, dtype=torch.uint8).view(dtype)}, file)
    assert_refused(file, "numbers of 8 bits")


def test_class_names_that_are_a_tensor_are_not_used(tmp_path):
    file = tmp_path / "f.pth"
    torch.save({"model": {"w": torch.ones(2)}, "class_names": torch.ones(2)}, file)
    assert set(read_weights(file)) == {"w"}


def test_a_manifest_of_deep_lists_does_not_fill_the_memory(tmp_path):
    depth, values = 800, 300_000
    text = "[" * depth + ",".join(["1"] * values) + "]" * depth
    (tmp_path / "manifest.json").write_text(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024  # KiB


@pytest.mark.parametrize("shapes", [[(), (), ()], [(1, 2), (1, 3), (1, 2)]])
def test_projections_that_cannot_be_joined_are_left_over(shapes):
    letters = zip("qkv", shapes, strict=True)
    name = "model.decoder.layers.0.self_attn.{}_proj.weight"
    found = HuggingFaceLayout().to_ours({name.format(x): torch.ones(s) for x, s in letters})
    assert not any(name.endswith("in_proj_weight") for name in found.tensors)
