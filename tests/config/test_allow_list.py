"""A YAML config is data: what it can reach, and what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import nn
from torch.optim import AdamW

from dn_detr.config import ConfigError, LazyConfig, instantiate
from dn_detr.config.nodes import to_node
from dn_detr.engine import multi_step
from dn_detr.modeling import Detector


def load(folder: Path, text: str, allow: tuple[str, ...] = ()) -> Any:
    path = folder / "config.yaml"
    path.write_text(text)
    return LazyConfig.load(path, allow=allow)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("torch.nn.ReLU", nn.ReLU),
        ("torch.nn.modules.activation.ReLU", nn.ReLU),
        ("torch.nn.functional.relu", nn.functional.relu),
        ("torch.nn.functional.gelu", nn.functional.gelu),
        ("torch.optim.AdamW", AdamW),
        ("dn_detr.engine.multi_step", multi_step),
        ("dn_detr.modeling.Detector", Detector),
        ("torch.nn.Embedding.from_pretrained", nn.Embedding.from_pretrained),
    ],
)
def test_targets_of_allowed_packages_are_found(tmp_path: Path, target: str, expected: Any) -> None:
    cfg = load(tmp_path, f"f: {{_target_: {target}, _partial_: true}}")
    assert instantiate(cfg)["f"] == expected


FORBIDDEN = [
    "os.system",
    "builtins.eval",
    "builtins.dict",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "torch.nn.modules.module.torch.load",
    "torch.optim.optimizer.torch.hub.load",
    "torch.nn.Module.__setattr__",
    "dn_detr.engine.train",
    "dn_detr.engine.training.instantiate",
    "torchvision.io.write_file",
    "dn_detr.config.lazy_config.sys.exit",
    "dn_detr.config.LazyConfig.load",
    "dn_detr.config.instantiate",
    "dn_detr.config.targets.locate",
    "dn_detr.config.targets.importlib.import_module",
    "torch.nn.Linear.__class__",
    "torch.nn.Linear.__init__.__globals__",
    "torch.nn.Module.__subclasses__",
    "torch.nn.functional.math",
    "torch.nn.functional",
    "torch.optim.optimizer.torch.nn",
]


@pytest.mark.parametrize("target", FORBIDDEN)
def test_everything_else_is_refused(tmp_path: Path, target: str) -> None:
    cfg = load(tmp_path, f"model:\n  x: {{_target_: {target}, _partial_: true}}")
    with pytest.raises(ConfigError, match=r"model\.x\._target_: .*(YAML|dotted name)"):
        instantiate(cfg.model)


@pytest.mark.parametrize(
    "text",
    [
        "name: os.getcwd\nx: {_target_: '${name}'}",
        "name: getcwd\nx: {_target_: 'os.${name}'}",
        "x: {_target_: '${oc.decode:os.getcwd}'}",
        "x: '${oc.create:{_target_:os.getcwd}}'",
        "inner: {_target_: os.getcwd}\nx: {y: ['${inner}']}",
        "x: {_target_: torch.nn.ReLU, inplace: {_target_: os.getcwd}}",
        "x: {_target_: [os, getcwd]}",
        "x: {_target_: 5}",
        "x: {_target_: {_target_: os.getcwd}}",
        "x: {_target_: {_target_: torch.nn.ReLU, _partial_: true}}",
    ],
)
def test_indirect_names_are_refused(tmp_path: Path, text: str) -> None:
    cfg = load(tmp_path, text)
    with pytest.raises(ConfigError, match=r"_target_: .*(YAML config may not|dotted name)"):
        instantiate(cfg.x)
    with pytest.raises(ConfigError):
        instantiate(cfg)


def test_downloaded_weights_cannot_be_unpickled(tmp_path: Path) -> None:
    """The way found by an attack: a method whose `self` the file chooses, and an address."""
    mark = tmp_path / "executed"
    (tmp_path / "evil.pth").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    text = f"""
        model:
          _target_: torchvision.models._api.WeightsEnum.get_state_dict
          self:
            _target_: torchvision.models._api.Weights
            url: file://{tmp_path}/evil.pth
            transforms: null
            meta: {{}}
          progress: false
          weights_only: false
          model_dir: {tmp_path}/cache
        """
    with pytest.raises(ConfigError, match="may not"):
        instantiate(load(tmp_path, text))
    assert not mark.exists()


@pytest.mark.parametrize(
    "target",
    [
        "dn_detr.modeling.backbones.resnet._read_file",
        "torch.nn.Module.load_state_dict",
        "torchvision.models.resnet50",
    ],
)
def test_private_names_methods_and_downloading_models_are_refused(
    tmp_path: Path, target: str
) -> None:
    with pytest.raises(ConfigError, match="may not"):
        instantiate(load(tmp_path, f"model: {{_target_: {target}}}"))


def test_forbidden_module_is_not_even_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    cfg = load(tmp_path, "x: {_target_: evil_module.f}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConfigError, match=r"load\(path, allow=\('evil_module',\)\)"):
            instantiate(cfg.x)


def test_caller_can_allow_a_package(tmp_path: Path) -> None:
    text = "x: {_target_: fractions.Fraction, numerator: 3}"
    assert instantiate(load(tmp_path, text, allow=("fractions",)).x) == 3
    with pytest.raises(ConfigError):
        instantiate(load(tmp_path, text, allow=("fraction",)).x)


@pytest.mark.parametrize("move", ["assign", "merge", "reference", "borrow", "override", "keyword"])
def test_restriction_stays_when_data_moves(tmp_path: Path, move: str) -> None:
    data = load(tmp_path, "x: {_target_: os.getcwd}\nname: os.getcwd\nempty: {}")
    cfg = to_node({"model": None, "keep": {"y": 1}})
    keywords = {}
    if move == "assign":
        cfg.model = data.x
    elif move == "merge":
        cfg = OmegaConf.merge(cfg, {"model": data.x})
    elif move == "reference":
        cfg.names = data
        cfg.model = {"_target_": "${names.name}"}
    elif move == "borrow":
        cfg.name = "os.getcwd"
        cfg.model = load(tmp_path, "x: {_target_: '${name}'}")
    elif move == "override":
        cfg.model = LazyConfig.apply_overrides(data, ["+empty.a={_target_:os.getcwd}"]).empty
    else:
        cfg.model = data.empty
        keywords = {"_target_": "os.getcwd"}
    with pytest.raises(ConfigError, match="YAML config may not"):
        instantiate(cfg.model, **keywords)


def test_python_config_is_not_restricted() -> None:
    assert instantiate(to_node({"_target_": "fractions.Fraction", "numerator": 2})) == 2
