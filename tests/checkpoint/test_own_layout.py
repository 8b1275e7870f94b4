"""What a project adds to a model: a key map for foreign files, and tensors that no file has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dn_detr.checkpoint import CheckpointError, Layout, load_tensors, read_weights
from dn_detr.config import LazyCall as L
from dn_detr.config import LazyConfig, instantiate
from dn_detr.engine import train
from dn_detr.modeling import Detector
from tests.checkpoint.tiny_models import tiny_config
from tests.engine.dummy import TinyDetector


class ForeignLayout(Layout):
    """A code base that calls the backbone `cnn` and the head `predict`."""

    name = "foreign"

    def pairs(self, names: Collection[str]) -> Sequence[tuple[str, str]]:
        return [
            ("backbone.*", "cnn.*"),
            ("norm.*", "ln.*"),
            ("head.*", "predict.*"),
            ("scale",) * 2,
        ]


class ProjectDetector(TinyDetector):
    """A detector of a project, which knows that code base."""

    def __init__(self, key_maps: Sequence[Layout] | Layout, num_classes: int = 2) -> None:
        super().__init__(num_classes=num_classes)
        self.key_maps = key_maps


class DetectorWithQuality(TinyDetector):
    """A detector of a project with one head more, which no published file has."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__(num_classes=num_classes)
        self.quality = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def foreign(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `TinyDetector` under the names of that code base."""
    names = {"backbone": "cnn", "norm": "ln", "head": "predict"}
    parts = {key: key.partition(".") for key in state}
    return {names.get(p, p) + dot + rest: state[key] for key, (p, dot, rest) in parts.items()}


def test_a_foreign_file_loads_through_a_layout_that_the_config_names(tmp_path):
    weights = {key: torch.rand_like(value) for key, value in TinyDetector().state_dict().items()}
    torch.save({"model": foreign(weights)}, tmp_path / "foreign.pth")
    cfg = LazyConfig.load("tests/engine/tiny_config.py")
    cfg.model = L(ProjectDetector)(key_maps=[L(ForeignLayout)()], num_classes=2)
    overrides = [
        f"train.output_dir={tmp_path / 'run'}",
        f"train.init_checkpoint={tmp_path / 'foreign.pth'}",
        "train.max_iter=1",
        "optimizer.lr=0",
    ]
    train(LazyConfig.apply_overrides(cfg, overrides))
    assert "foreign.pth (foreign layout)" in (tmp_path / "run" / "log.txt").read_text()
    found = read_weights(tmp_path / "run")
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def refusal(model: nn.Module, state: Mapping[str, Tensor], **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_tensors(model, state, **options)
    return str(error.value)


def test_what_a_foreign_file_lacks_is_told_in_its_names_too():
    state = foreign(TinyDetector().state_dict())
    del state["predict.bias"]
    model = ProjectDetector([ForeignLayout()])
    assert "missing from the file:\n  head.bias (predict.bias)" in refusal(model, state)


def test_a_tensor_without_a_pair_is_told_where_to_put_it():
    state = {**foreign(TinyDetector().state_dict()), "aux.weight": torch.zeros(1)}
    message = refusal(ProjectDetector([ForeignLayout()]), state)
    assert "1 unexpected in the file:\n  aux.weight" in message
    assert "ForeignLayout has no name for aux.weight: " in message and "`ignored`" in message


class Nameless(ForeignLayout):
    name = ""


class Unpaired(ForeignLayout):
    def pairs(self, names: Collection[str]) -> Any:
        return ["head.*", "norm.*"]


def test_pairs_that_are_none_are_named():
    message = refusal(ProjectDetector([Unpaired()]), foreign(TinyDetector().state_dict()))
    assert message == "pairs of a layout: 'head.*' is none of (our, their name)"


def test_one_layout_needs_no_list():
    state = foreign(TinyDetector().state_dict())
    assert load_tensors(ProjectDetector(ForeignLayout()), state).layout == "foreign"


def test_a_layout_without_a_name_is_refused_by_a_model_of_any_class():
    message = refusal(ProjectDetector([Nameless()]), foreign(TinyDetector().state_dict()))
    assert message.startswith("key_maps[0] is ") and "with a `name`" in message


@pytest.mark.parametrize("key_maps", [[ForeignLayout], ["foreign"], "foreign", Nameless()])
def test_what_is_no_layout_is_named_when_the_model_is_built(key_maps):
    cfg = tiny_config("dab_detr_r50")
    parts = {name: instantiate(node) for name, node in cfg.items() if name != "key_maps"}
    parts.pop("_target_")
    with pytest.raises(CheckpointError, match=r"key_maps\[0\] is .*MyLayout"):
        Detector(**parts, key_maps=key_maps)


def quality_run(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Train the detector with one head more without changing a weight; return its weights."""
    cfg = LazyConfig.load("tests/engine/tiny_config.py")
    cfg.model = L(DetectorWithQuality)(num_classes=2)
    start = [f"train.output_dir={folder}", "train.max_iter=1", "optimizer.lr=0"]
    train(LazyConfig.apply_overrides(cfg, [*start, *overrides]))
    return read_weights(folder)


def test_the_refusal_of_a_file_without_the_new_head_says_how_to_start_from_it(tmp_path):
    weights = TinyDetector().state_dict()
    torch.save(weights, tmp_path / "f.pth")
    start = f"train.init_checkpoint={tmp_path / 'f.pth'}"
    with pytest.raises(CheckpointError, match="4 missing from the file") as error:
        quality_run(tmp_path / "run", start)
    (to_paste,) = re.findall(r"'train\.init_fresh=.*'", str(error.value))
    assert to_paste == "'train.init_fresh=[quality.*]'"
    found = quality_run(tmp_path / "run", start, *shlex.split(to_paste))
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert "4 tensors keep their initial values" in (tmp_path / "run" / "log.txt").read_text()


def test_names_of_tensors_are_patterns_too():
    model, state = DetectorWithQuality(), TinyDetector().state_dict()
    names = [name for name in model.state_dict() if name.startswith("quality.")]
    assert load_tensors(model, state, fresh=names).fresh == tuple(names)


def test_a_fresh_tensor_keeps_its_values_although_the_file_has_it():
    model = DetectorWithQuality()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_tensors(model, DetectorWithQuality().state_dict(), fresh=["quality.0.*", "norm*"])
    assert report.notes == (
        "values of the file that train.init_fresh leaves out: "
        "norm.bias, norm.weight, quality.0.bias, quality.0.weight",
    )
    expected = ("norm.weight", "norm.bias", "quality.0.weight", "quality.0.bias")
    assert report.fresh == expected
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in expected)


def test_a_fresh_name_that_fits_no_tensor_is_an_error_with_the_nearest():
    message = refusal(TinyDetector(), TinyDetector().state_dict(), fresh=["head.wight"])
    assert message == (
        "the model has no tensor 'head.wight' (did you mean head.weight?), which should keep its "
        "initial values (train.init_fresh)"
    )


def test_without_training_nothing_may_be_missing():
    message = refusal(DetectorWithQuality(), TinyDetector().state_dict())
    assert "4 missing from the file" in message and "init_fresh" not in message


def test_a_module_that_the_file_has_in_part_is_named_tensor_by_tensor():
    state = DetectorWithQuality().state_dict()
    for name in ("quality.0.weight", "quality.0.bias", "quality.1.bias"):
        del state[name]
    message = refusal(DetectorWithQuality(), state, fine_tune=True)
    assert message.endswith("'train.init_fresh=[quality.0.*,quality.1.bias]'")
