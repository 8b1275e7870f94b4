"""Building objects from a config."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import nn

from dn_detr.config import ConfigError, LazyConfig, instantiate
from dn_detr.config import LazyCall as L
from dn_detr.config.nodes import to_node


def explode(**_: Any) -> None:
    raise KeyError("boom")


def needs(first: int, *, second: int = 2) -> tuple[int, int]:
    return first, second


class TakesWidth:
    def __init__(self, *, width: int = 1) -> None:
        self.width = width


class PassesOn(TakesWidth):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_inner_calls_are_made_before_outer_ones() -> None:
    net = instantiate(L(nn.MultiheadAttention)(embed_dim=4, num_heads=2, dropout=0.5, bias=False))
    assert isinstance(net, nn.MultiheadAttention) and net.dropout == 0.5
    nested = instantiate(L(dict)(a=L(dict)(b=L(needs)(first=1))))
    assert nested == {"a": {"b": (1, 2)}}


def test_calls_inside_plain_containers_are_made() -> None:
    cfg = to_node({"layers": [L(nn.ReLU)(), {"norm": (L(nn.ReLU)(), 3)}]})
    built = instantiate(cfg)
    assert isinstance(built["layers"][0], nn.ReLU)
    assert isinstance(built["layers"][1]["norm"][0], nn.ReLU)


def test_constructors_receive_plain_containers() -> None:
    built = instantiate(
        L(SimpleNamespace)(mapping={"a": [1, {"b": 2}]}, pair=(1, (2, [3])), none=None)
    )
    assert repr(built) == "namespace(mapping={'a': [1, {'b': 2}]}, pair=[1, [2, [3]]], none=None)"
    kinds = [type(built.mapping), type(built.mapping["a"]), type(built.mapping["a"][1])]
    assert kinds == [dict, list, dict]


@pytest.mark.parametrize("value", [3, "text", None, nn.ReLU])
def test_anything_else_is_returned_as_it_is(value: Any) -> None:
    assert instantiate(value) is value


def test_reference_is_built_each_time() -> None:
    built = instantiate(to_node({"x": L(SimpleNamespace)(), "a": "${x}", "b": "${.x}"}))
    assert len({id(value) for value in built.values()}) == 3


def test_partial_delays_the_call() -> None:
    later = instantiate(L(needs)(second=5, _partial_=True))
    assert isinstance(later, functools.partial) and later(1) == (1, 5)
    assert instantiate(L(needs)(_partial_=True)) is needs


def test_keyword_replaces_a_key_which_is_not_built() -> None:
    cfg = to_node({"model": L(SimpleNamespace)(params=L(explode)(), lr=0.1)})
    parameters = [{"params": [object()]}]
    built = instantiate(cfg.model, params=parameters, lr=0.2, extra=(1,))
    assert built.params is parameters  # not a copy
    assert (built.lr, built.extra) == (0.2, (1,))
    assert cfg.model.lr == 0.1


def test_keyword_needs_a_dict_node() -> None:
    with pytest.raises(ConfigError, match="cannot replace model"):
        instantiate(to_node([1]), model=1)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (L(needs)(frist=1), r"model\.x: .*needs\(first, \*, second=2\): .*'frist' \(did you mean"),
        (L(needs)(), r"model\.x: .*needs\(first, \*, second=2\): missing a required .*'first'"),
        (L(needs)(secon=1, _partial_=True), r"'secon' \(did you mean second\?\)"),
        (L(explode)(a=1), r"model\.x: KeyError: 'boom'\n\(while building .*explode\)$"),
        (L(PassesOn)(widht=1), r"'widht' \(did you mean width\?\)\n\(while building"),
        (L(dict)(y=[L(explode)()]), r"model\.x\.y\.0: KeyError: 'boom'\n.*explode"),
        (L(dict)(y="???"), r"model\.x\.y: is mandatory"),
        (L(dict)(y="${nope.z}"), r"model\.x\.y: cannot resolve .*'nope\.z' not found"),
        (L(dict)(y="${model}"), r"model\.x\.y: "),
        (L("no_such_package.f")(), r"model\.x\._target_: .*no module 'no_such_package'"),
        (L("torch.nn.Liner")(), r"model\.x\._target_: .*no attribute 'Liner'"),
        (L("torch.no_sub.f")(), r"model\.x\._target_: .*no attribute 'no_sub'"),
        (L("math.pi")(), r"model\.x\._target_: 3\.14.* cannot be called"),
        (L("not a name")(), r"model\.x\._target_: .*not the dotted name"),
        ({"_target_": None}, r"model\.x\._target_: None cannot be called"),
        ({"_target_": "???"}, r"model\.x\._target_: is mandatory"),
        ({"_target_": "${nope}"}, r"model\.x\._target_: cannot resolve"),
        ({"_partial_": True}, r"model\.x: has _partial_ but no _target_"),
        (L(dict)(_partial_="yes"), r"model\.x\._partial_: must be true or false"),
    ],
)
def test_error_names_the_key_the_target_and_the_parameters(node: Any, message: str) -> None:
    cfg = to_node({"model": {"x": node}})
    with pytest.raises(ConfigError, match=message):
        instantiate(cfg.model)


@dataclasses.dataclass
class Shape:
    """A dataclass as detection code bases have for the output of a backbone."""

    channels: int = 3
    stride: int | None = None


def test_dataclass_is_a_node_that_can_be_changed_and_built() -> None:
    cfg = to_node({"neck": L(SimpleNamespace)(shapes={"res3": Shape(channels=512)})})
    cfg = LazyConfig.apply_overrides(cfg, ["neck.shapes.res3.stride=8"])
    assert instantiate(cfg.neck).shapes == {"res3": Shape(512, 8)}
    assert "Shape\n" in LazyConfig.to_yaml(cfg)


def test_structured_node_builds_its_dataclass() -> None:
    cfg = to_node({"typed": OmegaConf.structured(Shape), "call": L(dict)(shape=None)})
    cfg.call.shape = OmegaConf.structured(Shape(stride=4))
    assert instantiate(cfg) == {"typed": Shape(), "call": {"shape": Shape(3, 4)}}
    written = OmegaConf.create(LazyConfig.to_yaml(cfg))
    assert written.typed == {"channels": 3, "stride": None}
    assert written.call.shape._target_.endswith("test_instantiate.Shape")


def test_escaped_text_stays_text() -> None:
    cfg = to_node({"x": "\\${oc.create:{_target_:builtins.list}}", "y": "${x}"})
    assert set(instantiate(cfg).values()) == {"${oc.create:{_target_:builtins.list}}"}


def test_failure_of_a_target_is_chained() -> None:
    with pytest.raises(ConfigError) as caught:
        instantiate(L(explode)())
    assert isinstance(caught.value.__cause__, KeyError)


def test_circle_of_references_is_an_error() -> None:
    cfg = to_node({"a": L(dict)(x="${b}"), "b": L(dict)(x="${a}")})
    with pytest.raises(ConfigError, match="refers to a node that contains it"):
        instantiate(cfg)
