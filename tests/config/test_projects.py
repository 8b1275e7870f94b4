"""Projects: a package outside the library, and one below `dn_detr.projects`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dn_detr.projects
from dn_detr import model_zoo
from dn_detr.config import (
    ConfigError,
    LazyConfig,
    get_config,
    instantiate,
    list_configs,
    resolve_config_file,
)

FILES = {
    "__init__.py": "",
    "modeling/__init__.py": "from .net import Net\n",
    "modeling/net.py": (
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, width, size=1):\n"
        "        super().__init__()\n        self.width = width\n"
    ),
    "configs/models/net.py": (
        "from dn_detr.config import LazyCall as L\n\nfrom ...modeling import Net\n\n"
        "model = L(Net)(width=2)\n"
    ),
    "configs/tiny_net.py": (
        "from dn_detr.configs.common.schedule_12ep import lr_schedule, train\n"
        "from dn_detr.configs.models import dn_detr_r50 as _zoo\n\n"
        "from ..modeling.net import Net\nfrom .models.net import model\n\n"
        "neck = _zoo.model.neck\nmodel.size = Net\ntrain.epochs += 1\n"
    ),
}


def write_project(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets what was imported, and where from."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if "own_project" in name or "in_house" in name:
            del sys.modules[name]


@pytest.fixture
def own_project(tmp_path: Path, imports: None) -> Path:
    """A project in somebody's own folder."""
    return write_project(tmp_path / "somewhere" / "own_project")


@pytest.fixture
def in_house(tmp_path: Path, imports: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a folder of `dn_detr.projects`."""
    path = [*dn_detr.projects.__path__, str(tmp_path / "projects")]
    monkeypatch.setattr(dn_detr.projects, "__path__", path)
    return write_project(tmp_path / "projects" / "in_house")


def test_config_of_an_own_folder_builds_and_is_saved_by_the_names_of_its_classes(
    own_project: Path,
) -> None:
    cfg = LazyConfig.load(own_project / "configs" / "tiny_net.py")
    assert str(own_project.parent) == sys.path[-1]
    net = instantiate(cfg.model)
    assert type(net).__module__ == "own_project.modeling.net" and net.width == 2
    assert "_target_: own_project.modeling.net.Net" in LazyConfig.to_yaml(cfg)
    assert cfg.train.output_dir == "output/tiny_net"


def test_saved_config_runs_again_where_its_package_is_trusted(
    own_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    LazyConfig.save(LazyConfig.load(own_project / "configs" / "tiny_net.py"), path)
    with pytest.raises(ConfigError, match=r"config\.yaml: model\._target_: .*--trust own_project"):
        LazyConfig.load(path)
    sys.path.remove(str(own_project.parent))
    monkeypatch.chdir(own_project.parent)
    cfg = LazyConfig.load(path, allow=("own_project",), overrides=["model.width=3"])
    assert instantiate(cfg.model).width == 3


def test_configs_are_fresh_copies_and_modules_are_not(own_project: Path) -> None:
    path = own_project / "configs" / "tiny_net.py"
    first, second = LazyConfig.load(path), LazyConfig.load(path)
    assert first.train.epochs == second.train.epochs == 13
    assert get_config("common/schedule_12ep.py").train.epochs == 12
    assert first.model.size is second.model.size is sys.modules["own_project.modeling"].Net
    assert first.neck == get_config("models/dn_detr_r50.py").model.neck


def test_package_of_another_folder_is_not_taken_for_the_own_one(
    own_project: Path, tmp_path: Path
) -> None:
    LazyConfig.load(own_project / "configs" / "tiny_net.py")
    other = write_project(tmp_path / "elsewhere" / "own_project")
    with pytest.raises(ConfigError, match="is the name of another package"):
        LazyConfig.load(other / "configs" / "tiny_net.py")


def test_missing_module_is_named(own_project: Path) -> None:
    config = own_project / "configs" / "wrong.py"
    config.write_text("from ..models import Net\n")
    with pytest.raises(ConfigError, match=r"wrong\.py, line 1: .*no module .*own_project/models"):
        LazyConfig.load(config)


def test_class_that_has_no_importable_name_says_what_would_give_it_one(own_project: Path) -> None:
    (own_project / "__init__.py").unlink()
    (own_project / "modeling" / "__init__.py").unlink()
    config = own_project / "configs" / "loose.py"
    config.write_text("from ..modeling.net import Net\n\nmodel = dict(net=dict(_target_=Net))\n")
    with pytest.raises(ConfigError, match=r"model\.net\._target_: .*__init__\.py"):
        LazyConfig.to_yaml(LazyConfig.load(config))


def test_folder_whose_name_cannot_be_imported_is_to_be_renamed(own_project: Path) -> None:
    own_project = own_project.rename(own_project.with_name("own-project"))
    with pytest.raises(ConfigError, match=r"line 4: 'own-project' in .* rename it"):
        LazyConfig.load(own_project / "configs" / "tiny_net.py")


def test_config_that_was_copied_out_of_its_package_says_where_it_must_lie(
    own_project: Path, tmp_path: Path
) -> None:
    copied = shutil.copy(own_project / "configs" / "tiny_net.py", tmp_path)
    with pytest.raises(ConfigError, match=r"line 4: .* must lie in the package, in its folder con"):
        LazyConfig.load(copied)


def test_project_of_the_library_is_found_by_name_and_by_path(in_house: Path) -> None:
    path = in_house / "configs" / "tiny_net.py"
    assert "tiny_net.py" in list_configs() and "tiny_net" in model_zoo.list_models()
    assert resolve_config_file("tiny_net") == path
    for cfg in (get_config("tiny_net"), LazyConfig.load(path)):
        assert cfg.model._target_ == "dn_detr.projects.in_house.modeling.net.Net"
    assert model_zoo.get_model("tiny_net", overrides=["model.width=5"]).width == 5


def test_config_of_a_project_of_the_library_needs_no_trust(in_house: Path, tmp_path: Path) -> None:
    LazyConfig.save(get_config("tiny_net"), tmp_path / "config.yaml")
    net = instantiate(LazyConfig.load(tmp_path / "config.yaml").model)
    assert isinstance(net, torch.nn.Module)
    assert type(net).__module__ == "dn_detr.projects.in_house.modeling.net"
