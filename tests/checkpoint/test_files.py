"""Reading files of any kind, and never running what they hold."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dn_detr.checkpoint import CheckpointError, Snapshot, read_weights
from dn_detr.checkpoint.files import read_file
from tests.checkpoint.writing import save

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def assert_read(path, **options):
    tensors = read_file(path, **options).tensors
    assert tensors.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_files_of_torch_are_read(tmp_path, zipped, wrapper):
    content = {wrapper: WEIGHTS} if wrapper else WEIGHTS
    torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "f.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_scripts_put_beside_the_weights_does_no_harm(tmp_path, zipped):
    beside = {
        "args": argparse.Namespace(lr=1e-4, output_dir=Path("out"), names=["a"], n=np.int64(3)),
        "best": np.float64(0.5),
        "ap": np.arange(3.0),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 49,
        "trainer": {"iteration": 9, "hooks": collections.OrderedDict(x=1)},
    }
    file = tmp_path / "f.pth"
    torch.save({"model": WEIGHTS, **beside}, file, _use_new_zipfile_serialization=zipped)
    assert_read(file)


def test_a_pickle_of_arrays_is_read(tmp_path):
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    for protocol in (2, 4):
        (tmp_path / "f.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        assert_read(tmp_path / "f.pkl")


def test_a_pickle_written_by_the_first_numpy_is_read(tmp_path):
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    data = pickle.dumps({"model": arrays}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in data
    (tmp_path / "f.pkl").write_bytes(data)
    assert_read(tmp_path / "f.pkl")


@pytest.mark.parametrize("place", ["beside", "inside"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pkl"])
def test_a_payload_does_not_run(tmp_path, kind, place):
    trap = tmp_path / "the payload ran"
    payload = Payload(trap)
    weights = WEIGHTS if kind != "pkl" else {k: v.numpy() for k, v in WEIGHTS.items()}
    content = {"model": {**weights, "x": payload}}
    if place == "beside":
        content = {"model": weights, "args": payload}
    file = tmp_path / f"f.{kind}"
    if kind == "pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which may not be loaded.*nothing"):
        read_weights(file)
    assert not trap.exists()
    pickle.loads(pickle.dumps(payload))  # the trap itself works
    assert trap.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x02cbuiltins\nexec\nX\x03\x00\x00\x00x=1\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
        b"\x80\x02cnumpy.f2py\ndiagnose\n)R.",
        b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    ],
)
def test_functions_in_a_pickle_are_refused(tmp_path, code):
    (tmp_path / "f.pkl").write_bytes(code)
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "f.pkl")


def test_bytes_are_decoded_in_the_way_of_pickles_alone(tmp_path):
    code = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00hex\x86R."
    (tmp_path / "f.pkl").write_bytes(code)
    with pytest.raises(CheckpointError, match="encoding 'hex'"):
        read_weights(tmp_path / "f.pkl")


def test_a_whole_pickled_module_is_refused_with_the_remedy(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=r"Linear, which may not.*model\.state_dict\(\)"):
        read_weights(tmp_path / "f.pth")


@pytest.mark.parametrize(
    ("content", "look"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n <HTML>\n<head></head></HTML>", "a web page"),
        (b'{"this": "is some text and nothing else"}', "a text file"),
        (b"\x1f\x8b\x08\x00 compressed", "gzip"),
        (b"\x00\x01\x02\x03", "neither a file of torch"),
        (b"\x80", "damaged or truncated"),
        (b"PK\x03\x04 and then nothing of use", "damaged or truncated"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "pkl", "bin"])
def test_other_files_are_named_for_what_they_look_like(tmp_path, content, look, suffix):
    file = tmp_path / f"f.{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"f\.{suffix}: .*{look}"):
        read_weights(file)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pkl", "safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_damaged(tmp_path, kind, part):
    large = {"weight": torch.arange(5000.0), "bias": torch.zeros(3)}
    file = tmp_path / f"f.{kind}"
    if kind == "pkl":
        file.write_bytes(pickle.dumps({k: v.numpy() for k, v in large.items()}))
    elif kind == "safetensors":
        save_file(large, file)
    else:
        torch.save(large, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(CheckpointError, match=rf"f\.{kind}: damaged or"):
        read_weights(file)


def test_a_web_page_named_safetensors_is_a_web_page(tmp_path):
    (tmp_path / "f.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError, match="a web page"):
        read_weights(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "one object of type list"),
        ({"epoch": 3, "optimizer": {}}, r"holds no weights; its entries are epoch \(int\)"),
        ({"model": {}}, "holds no weights; it is empty"),
        ({"model": {**WEIGHTS, "step": 3}}, r"1 entries .* no tensors: step \(int\)"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path, content, message):
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "f.pth")


def test_an_ema_is_noted_and_can_be_chosen(tmp_path):
    zeros = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}
    torch.save({"model": zeros, "ema_state": WEIGHTS}, tmp_path / "f.pth")
    assert_read(tmp_path / "f.pth", ema=True)
    plain = read_file(tmp_path / "f.pth")
    assert plain.tensors["a.weight"].sum() == 0
    assert "which was not taken" in plain.notes[0]


def test_an_ema_that_is_absent_is_an_error(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "f.pth")
    save_file(WEIGHTS, tmp_path / "f.safetensors")
    save(tmp_path / "run", Snapshot(1, 0.0, WEIGHTS))
    for path in (tmp_path / "f.pth", tmp_path / "f.safetensors", tmp_path / "run"):
        with pytest.raises(CheckpointError, match="no EMA"):
            read_file(path, ema=True)


def test_our_checkpoint_gives_its_class_names(tmp_path):
    save(tmp_path, Snapshot(1, 0.0, WEIGHTS), class_names=["dog", "cat"])
    assert read_file(tmp_path).class_names == ("dog", "cat")
    assert read_file(tmp_path / "checkpoints/last/model.safetensors").class_names == ("dog", "cat")


def huggingface_folder(folder, labels):
    folder.mkdir()
    config = {"id2label": {str(i): name for i, name in labels.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_folders_of_transformers_are_read(tmp_path):
    folder = huggingface_folder(tmp_path / "hf", {0: "N/A", 2: "person"})
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    assert_read(folder)
    save_file(WEIGHTS, folder / "model.safetensors")
    assert_read(folder)
    assert read_file(folder).class_names == ("N/A", None, "person")
    assert read_file(folder / "model.safetensors").class_names == ("N/A", None, "person")


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights .*pytorch_model\.bin"):
        read_weights(huggingface_folder(tmp_path / "hf", {}))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_weights(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match=r"neither a checkpoint folder.*with config\.json"):
        read_weights(tmp_path)


def test_large_files_stay_on_the_disk(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "f.pth")
    save_file(WEIGHTS, tmp_path / "f.safetensors")
    for file in ("f.pth", "f.safetensors"):
        tensor = read_weights(tmp_path / file)["a.weight"]
        name = tensor.untyped_storage().filename or ""
        maps = Path("/proc/self/maps")
        mapped = maps.is_file() and str(tmp_path / file) in maps.read_text()
        assert name or mapped, file


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="a TorchScript archive, which is a program"):
        read_weights(tmp_path / "f.pt")


def test_any_other_zip_archive_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match=r"f\.zip: a zip archive, but not .* a\.txt"):
        read_weights(tmp_path / "f.zip")
