"""Loading Python config files."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path

import pytest

from dn_detr.config import ConfigError, LazyConfig, instantiate

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_public_data_is_kept_and_code_is_left_out(write: Write) -> None:
    path = write(
        "run.py",
        "import math\nfrom math import pi\nfrom dn_detr.config import LazyCall as L\n"
        "def f():\n    return 1\n"
        "_hidden = 1\nkind = int\n"
        "a = 1\nb = 'x'\nc = (1, 2)\nd = [1]\ne = None\nf2 = 2.5\ng = True\nh = L(dict)(x=a)\n",
    )
    cfg = LazyConfig.load(path)
    assert list(cfg) == ["a", "b", "c", "d", "e", "f2", "g", "h"]
    assert cfg.c == [1, 2]


def test_neighbours_are_imported_by_file_path_without_packages(write: Write) -> None:
    write("zoo/models/net.py", "width = 4\nmodel = dict(width=width)\n")
    write("zoo/common/train.py", "train = dict(seed=1)\n")
    write("top.py", "factor = 10\n")
    path = write(
        "zoo/run.py",
        "from .models.net import model\nfrom .common import train as schedule\n"
        "from . import common_free\nfrom ..top import factor\n"
        "train = schedule.train\nextra = common_free.value\n",
    )
    write("zoo/common_free.py", "value = 5\n")
    assert LazyConfig.load(path) == {
        "model": {"width": 4},
        "factor": 10,
        "train": {"seed": 1},
        "extra": 5,
    }


def test_star_import_brings_all_public_names(write: Write) -> None:
    write("base.py", "model = dict(a=1)\ntrain = dict(b=2)\n")
    path = write("run.py", "from .base import *\ntrain['b'] = 3\n")
    assert LazyConfig.load(path) == {"model": {"a": 1}, "train": {"b": 3}}


def test_every_importer_has_a_private_copy(write: Write) -> None:
    write("base.py", "model = dict(depth=6)\n")
    write("deep.py", "from .base import model\nmodel['depth'] = 12\n")
    path = write(
        "run.py",
        "from .deep import model as deep\nfrom .base import model as base\n",
    )
    cfg = LazyConfig.load(path)
    assert (cfg.deep.depth, cfg.base.depth) == (12, 6)
    cfg.base.depth = 1
    assert LazyConfig.load(path).base.depth == 6


def test_two_imports_of_one_file_share_one_run(write: Write) -> None:
    write("base.py", "from dn_detr.config import LazyCall as L\na = L(dict)(x=1)\nb = [a]\n")
    path = write("run.py", "from .base import a\nfrom .base import b\nsame = b[0] is a\n")
    assert LazyConfig.load(path).same is True


def test_absolute_interpolation_resolves_in_every_part_of_the_root(write: Write) -> None:
    write("data.py", "dataloader = dict(root='here', train=dict(path='${dataloader.root}/x'))\n")
    model = "model = dict(root='${dataloader.root}')"
    path = write("run.py", f"from .data import dataloader\n{model}\n")
    cfg = LazyConfig.load(path)
    assert (cfg.dataloader.train.path, cfg.model.root) == ("here/x", "here")
    assert instantiate(cfg.model) == {"root": "here"}
    assert LazyConfig.load(path).model.root == "here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = (\n", r"run\.py, line 2: syntax error"),
        ("a = 1\nb = a / 0\n", r"run\.py, line 2: ZeroDivisionError: division by zero"),
        ("a = 1\n\nraise KeyError('no')\n", r"run\.py, line 3: KeyError"),
        (
            "from .absent import x\n",
            r"run\.py, line 1: import of a config: there is no file .*absent",
        ),
        ("from .common import trian\n", r"no file .*trian\.py \(did you mean train\?\)"),
        (
            "from .common.train import broken\n",
            r"run\.py, line 1: ImportError: cannot import name 'broken'",
        ),
        ("from .common.bad import x\n", r"run\.py, line 1: .*bad\.py, line 2: NameError"),
        ("from .run import a\na = 1\n", r"imports itself: run\.py -> run\.py"),
        ("a = '\0'\n", r"run\.py"),
        (
            "from dn_detr.config import LazyCall as L\na = L(dict)(1)\n",
            r"run\.py, line 2: TypeError: L\(builtins.dict\) takes keyword arguments only",
        ),
    ],
)
def test_error_names_file_and_line(write: Write, text: str, message: str) -> None:
    write("common/train.py", "train = {}\n")
    write("common/bad.py", "x = 1\ny = z\n")
    with pytest.raises(ConfigError, match=message):
        LazyConfig.load(write("run.py", text))


@pytest.mark.parametrize("text", ["a = 1\n", "raise ValueError\n", "from .x import y\n"])
def test_loading_leaves_the_import_of_the_process_alone(write: Write, text: str) -> None:
    write("x.py", "raise RuntimeError\n")
    original = builtins.__import__
    probe = "import builtins, dn_detr.config as c\nc.seen.append(builtins.__import__)\n"
    import dn_detr.config as config_package

    config_package.seen = seen = []  # type: ignore[attr-defined]
    try:
        LazyConfig.load(write("run.py", probe + text))
    except ConfigError:
        pass
    finally:
        del config_package.seen  # type: ignore[attr-defined]
    assert seen == [original]
    assert builtins.__import__ is original


def test_missing_file_names_its_neighbour(write: Write) -> None:
    path = write("dn_detr_r50.py", "a = 1\n")
    with pytest.raises(
        ConfigError, match=r"does not exist, or is no file \(did you mean .*dn_detr_r50\.py\?\)"
    ):
        LazyConfig.load(path.with_name("dn_detr_r5.py"))


def test_other_file_types_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"neither a \.py nor a \.yaml"):
        LazyConfig.load(write("run.json", "{}"))
