"""A YAML config is data: what it can reach, and what it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import ColorJitter

from dn_detr.config import ConfigError, LazyConfig, instantiate
from dn_detr.config.nodes import to_node
from dn_detr.config.targets import locate
from dn_detr.config.yaml_check import FUNCTIONS, TRUSTED, check_targets
from dn_detr.engine import TrainSettings, multi_step
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
        ("torch.optim.AdamW", AdamW),
        ("torch.optim.lr_scheduler.StepLR", StepLR),
        ("torchvision.transforms.v2.ColorJitter", ColorJitter),
        ("torchvision.ops.FrozenBatchNorm2d", FrozenBatchNorm2d),
        ("dn_detr.engine.multi_step", multi_step),
        ("dn_detr.modeling.Detector", Detector),
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
    "dn_detr.engine.build.instantiate",
    "torchvision.io.write_file",
    "dn_detr.config.packages.sys.exit",
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
    "torch.nn.functional.relu",
    "torch.nn.modules.module.register_module_forward_hook",
    "torch.nn.Embedding.from_pretrained",
    "torch.nn.DataParallel",
    "torchvision.transforms.v2.functional.to_pil_image",
    "torchvision.ops.nms",
    "dn_detr.checkpoint.save_weights",
    "dn_detr.data.read_image",
    "dn_detr.modeling.TimmBackbone.load_pretrained",
    "dn_detr.signals.exit_when_signalled",
]


def test_the_functions_that_can_be_named_are_those_of_the_list() -> None:
    roots = ("dn_detr.", "torch.nn.", "torch.optim.", "torchvision.")
    trusted = tuple(f"{package}." for package in TRUSTED)  # imported or not by other tests
    modules = [n for n in list(sys.modules) if n.startswith(roots) and not n.startswith(trusted)]
    functions = {
        f"{module}.{name}"
        for module in modules
        for name, value in list(vars(sys.modules[module]).items())
        if callable(value) and not isinstance(value, type)
    }
    assert len(functions) > 1000
    named = {locate(name) for name in functions if is_allowed(name)}
    assert named == {locate(name) for name in FUNCTIONS}


def is_allowed(name: str) -> bool:
    try:
        check_targets(to_node({"_target_": name}), "x.yaml", ())
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("target", FORBIDDEN)
def test_everything_else_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.x\._target_: .*(YAML|dotted name)"):
        load(tmp_path, f"model:\n  x: {{_target_: {target}, _partial_: true}}")


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
        "x: '${oc.${y}:{_target_:os.getcwd}}'\ny: create",
        "x: '\\\\${oc.create:{_target_:os.getcwd}}'",
        "x: '\\${oc.env:HOME}'",
        "x: '${oc.env:HOME}'",
        "x: '${own:1}'",
        "x: [{y: {z: [{_target_: os.getcwd}]}}]",
        "x: {_args_: [], _target_: os.getcwd}",
        "x: {_target_: hydra.utils.get_method, path: os.getcwd}",
        "x: {_target_: hydra.utils.instantiate}",
    ],
)
def test_indirect_names_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r": .*(YAML config may not|YAML may not)"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["${y.z}/a:b", "${y.${w}}", "a: {b}", "${y.z}${w}", "\\${a}", "a:${w}"]
)
def test_references_and_texts_are_not_taken_for_resolvers(tmp_path: Path, text: str) -> None:
    assert "x" in load(tmp_path, f"x: '{text}'\ny: {{z: 1}}\nw: z")


@pytest.mark.parametrize(
    "override",
    [
        "x.y._target_=os.getcwd",
        "+x.z={_target_:os.getcwd}",
        "x.y={_target_:os.getcwd}",
        "+x.b='${oc.create:{_target_:os.getcwd}}'",
    ],
)
def test_an_override_cannot_lead_to_what_the_file_may_not_name(
    tmp_path: Path, override: str
) -> None:
    (tmp_path / "config.yaml").write_text("x: {y: {_target_: torch.nn.ReLU}, a: text}")
    with pytest.raises(ConfigError, match="YAML"):
        LazyConfig.load(tmp_path / "config.yaml", overrides=[override])


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
        load(tmp_path, text)
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
        load(tmp_path, f"model: {{_target_: {target}}}")


def test_forbidden_module_is_not_even_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConfigError, match=r"add --trust evil_module .*allow=\['evil_module'\]"):
            load(tmp_path, "x: {_target_: evil_module.f}")


def test_caller_can_allow_a_package(tmp_path: Path) -> None:
    text = "x: {_target_: packaging.version.Version, version: '3'}"
    assert str(instantiate(load(tmp_path, text, allow=("packaging",)).x)) == "3"
    with pytest.raises(ConfigError, match="add --trust packaging"):
        load(tmp_path, text, allow=("numbers",))
    reached = "x: {_target_: packaging.version.functools.partial}"
    with pytest.raises(ConfigError, match="only what is defined in packaging itself is trusted"):
        load(tmp_path, reached, allow=("packaging",))


def test_trusted_package_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run the command in the folder that has no_such_pack/"):
        load(tmp_path, "x: 1", allow=("no_such_pack.models",))


@pytest.mark.parametrize("package", ["fractions.Fraction", "fractions.other", "fractions.", "a-b"])
def test_what_is_trusted_must_be_a_package_or_a_module(tmp_path: Path, package: str) -> None:
    with pytest.raises(ConfigError, match=f"the trusted package '?{package}'? (cannot|is not)"):
        load(tmp_path, "x: 1", allow=(package,))


def test_a_trusted_package_that_fails_is_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_package").mkdir()
    (tmp_path / "failing_package" / "__init__.py").write_text("raise KeyError('reason')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"failing_package\.models cannot be imported"):
        load(tmp_path, "x: 1", allow=("failing_package.models",))


@pytest.mark.parametrize(
    "name",
    ["dn_detr.engine.train", "torch.load", "os.system", "torch.nn.modules.container.operator.call"],
)
def test_trust_is_not_the_remedy_for_what_the_libraries_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a Python config may name anything") as caught:
        load(tmp_path, f"x: {{_target_: {name}}}")
    assert "--trust" not in str(caught.value)


def test_python_config_is_not_restricted() -> None:
    assert instantiate(to_node({"_target_": "fractions.Fraction", "numerator": 2})) == 2


def test_override_is_not_told_what_a_resolver_would_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An override compares types with the old value, so it must not be resolved for that."""
    monkeypatch.setenv("SECRET", "s3cr3t")
    (tmp_path / "config.yaml").write_text("x: '${oc.env:SECRET}'")
    with pytest.raises(ConfigError, match="calls a resolver") as caught:
        LazyConfig.load(tmp_path / "config.yaml", overrides=["x=1"])
    assert "s3cr3t" not in str(caught.value)


def test_text_that_becomes_a_resolver_when_resolved_stays_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "s3cr3t")
    sections = "model: {}\ndataloader: {}\noptimizer: {}\nlr_schedule: {}\n"
    parts = "a: '\\${oc.env'\nb: ':SECRET}'\ntrain: {output_dir: '${a}${b}'}"
    settings = TrainSettings.from_config(load(tmp_path, sections + parts))
    assert settings.output_dir == "${oc.env:SECRET}"


@pytest.mark.parametrize("name", ["a" * 3000, "torch.nn." + "a" * 3000, "a b", "\x1b[31m", ""])
def test_target_that_is_no_dotted_name_is_refused_in_few_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no dotted name") as caught:
        load(tmp_path, f"x: {{_target_: {json.dumps(name)}}}")
    assert len(str(caught.value)) < 300 and "\x1b" not in str(caught.value)
