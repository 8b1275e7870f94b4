"""Command-line overrides: what they change, and what they refuse."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dn_detr.config import ConfigError, LazyConfig
from dn_detr.config import LazyCall as L
from dn_detr.config.nodes import to_node


def example() -> DictConfig:
    cfg: DictConfig = to_node(
        {
            "train": {
                "seed": 42,
                "device": "auto",
                "amp": {"enabled": False},
                "eval_period": "1ep",
                "checkpoint": {"period": 100},
                "max_iter": None,
                "must": "???",
            },
            "optimizer": {"lr": 1e-4, "betas": (0.9, 0.999), "milestones": [40, 45]},
            "dataloader": {"train": {"num_workers": 4, "seed": "${train.seed}"}},
            "model": {"denoising": L(nn.Linear)(in_features=1), "same": "${.denoising}"},
            "empty": [],
            "mixed": [1, "a", None],
            "norm": nn.ReLU,
        }
    )
    return cfg


def apply(*tokens: str) -> dict[str, Any]:
    cfg = LazyConfig.apply_overrides(example(), ["train.must=1", *tokens])
    data: dict[str, Any] = resolved(cfg)
    return data


def resolved(cfg: DictConfig) -> Any:
    return OmegaConf.to_container(cfg, resolve=True)


def lookup(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[int(part)] if isinstance(data, (list, tuple)) else data[part]
    return data


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("train.seed=7", 7),
        ("train.seed=-7", -7),
        ("train.device=cuda", "cuda"),
        ("train.device=", ""),
        ("train.device='a=b,c'", "a=b,c"),
        ('train.device="5"', "5"),
        ("train.device='None'", "None"),
        ("train.device=/data/x-y_z.pth", "/data/x-y_z.pth"),
        ("train.amp.enabled=true", True),
        ("train.max_iter=5", 5),
        ("train.max_iter=text", "text"),
        ("train.seed=null", None),
        ("optimizer.lr=2", 2.0),
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr=inf", float("inf")),
        ("optimizer.betas=[0.8,1]", [0.8, 1.0]),
        ("optimizer.betas.0=0.5", 0.5),
        ("optimizer.milestones=[1,2,3]", [1, 2, 3]),
        ("optimizer.milestones=[]", []),
        ("empty=[1,a]", [1, "a"]),
        ("mixed=[b,null,2]", ["b", None, 2]),
        ("dataloader.train.seed=3", 3),
        ("dataloader.train.num_workers=${train.must}", 1),
        ("model.denoising=null", None),
        ("model.same=null", None),
        ("train.eval_period=100", 100),
        ("train.eval_period=0.5ep", "0.5ep"),
        ("train.checkpoint.period=2ep", "2ep"),
        ("+train.new=1", 1),
        ("+new.deep.key=[1,{a:b}]", [1, {"a": "b"}]),
    ],
)
def test_value_is_set(token: str, expected: Any) -> None:
    value = lookup(apply(token), token.lstrip("+").partition("=")[0])
    assert value == expected and type(value) is type(expected)


def test_integer_stays_a_float_where_the_config_has_one() -> None:
    assert type(apply("optimizer.betas=[1,1]")["optimizer"]["betas"][0]) is float


def test_tokens_are_applied_in_order() -> None:
    assert apply("~train.seed", "+train.seed=text")["train"]["seed"] == "text"
    assert apply("train.seed=1", "train.seed=2")["train"]["seed"] == 2


def test_references_see_the_override() -> None:
    assert apply("train.seed=9")["dataloader"]["train"]["seed"] == 9


def test_dict_changes_exactly_its_keys() -> None:
    expected = apply()
    expected["train"].update(seed=1, amp={"enabled": True})
    expected["dataloader"]["train"]["seed"] = 1
    assert apply("train={seed:1,amp:{enabled:true}}") == expected


def test_deleting_keys_and_elements() -> None:
    assert "seed" not in apply("~train.seed", "~dataloader")["train"]
    assert apply("~optimizer.milestones.0")["optimizer"]["milestones"] == [45]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("dataloader.train.num_worker=3", r"num_worker \(did you mean dataloader\.train\.num_w"),
        ("num_workers=3", r"no key num_workers \(did you mean dataloader\.train\.num_workers\?\)"),
        ("trian.seed=3", r"no key trian\.seed \(did you mean train\.seed\?\); .*\+trian\.seed="),
        ("train={sed:1}", r"no key train\.sed \(did you mean train\.seed\?\)"),
        ("~train.sed", r"no key train\.sed \(did you mean train\.seed\?\)$"),
        ("qqqqqq=1", r"no key qqqqqq; to add"),
        ("train.seed.x=1", r"train\.seed is 42 of type int, so nothing lies below"),
        ("train.max_iter.x=1", r"train\.max_iter is null"),
        ("model.same.in_features=2", r"model\.same refers to model\.denoising .*override that"),
        ("model.same={in_features:2}", r"model\.same refers to model\.denoising"),
        ("optimizer.milestones.2=1", r"list with indices 0 to 1"),
        ("optimizer.milestones.x=1", r"list with indices 0 to 1"),
        ("+optimizer.milestones.2=1", r"list with indices 0 to 1"),
        ("++train.seed=1", r"train\.seed=value to change a key, \+train\.seed=value to add"),
        ("+train.seed=1", r"train\.seed exists"),
        ("~train.seed=1", r"write ~train\.seed to delete"),
        ("train.seed=None", r"write null"),
        ("train.device=None", r"write null"),
        ("optimizer.milestones=[None]", r"write null"),
        ("train.seed=1,2", r"sweep"),
        ("train.seed=choice(1,2)", r"sweep"),
        ("train.seed=range(1,3)", r"sweep"),
        ("train.device=http://x?a=b", r"\"train\.device='http://x\?a=b'\""),
        ("train.device=it's", r"'train\.device=\"it's\"'"),
        ("optimizer.betas=(1,2)", r"write a list, optimizer\.betas=\[1,2\]"),
        ("optimizer.milestones[0]=1", r"list\.0=value"),
        ("train.seed", r"write key=value"),
        ("--resume", r"looks like an option"),
        ("-x=1", r"looks like an option"),
        ("train@x=1", r"write key=value"),
        ("+train/x=1", r"write key=value"),
        ("=5", r"write key=value"),
        (f"train.seed={'9' * 6000}", r"value has 6000 digits"),
        ("train.output_dir='\udcff'", "surrogates not allowed"),
        ("dataloader.train.num_workers=${nope}", r"cannot resolve"),
        ("dataloader.train.num_workers=${train.device}", r"num_workers takes an int"),
    ],
)
def test_mistake_is_an_error_with_its_remedy(token: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        apply(token)
    assert str(caught.value).startswith(f"override {token!r}: ")


WRONG_TYPES = {
    "train.seed": ["1.0", "1.5", "true", "text", "'1'", "[1]", "{a:1}", "1ep"],
    "train.device": ["1", "1.5", "true", "[a]", "{a:1}"],
    "train.amp.enabled": ["1", "0", "0.0", "'true'", "yes", "[true]", "{a:1}"],
    "optimizer.lr": ["true", "text", "'1.0'", "[1.0]", "{a:1}"],
    "train.eval_period": ["1.5", "true", "1epoch", "-1ep", "ep", "[1]"],
    "train.checkpoint.period": ["1.5", "true", "1 ep", "text"],
    "optimizer.betas": ["0.9", "text", "[a,b]", "[true,0.9]", "{a:1}", "[[0.9]]"],
    "optimizer.milestones": ["40", "[1.5]", "[a]", "[true]", "{a:1}"],
    "mixed": ["[1.5]", "[true]"],
    "dataloader.train.seed": ["1.5", "text"],
    "train.amp": ["1", "text", "[1]"],
    "model.denoising": ["text", "3"],
    "model.same": ["text"],
    "norm": ["text", "torch.nn.ReLU"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values]
)
def test_value_of_another_type_is_an_error(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}(\.\d)* takes |no key {key}\.a"):
        apply(f"{key}={value}")


@pytest.mark.parametrize(("text", "value"), [("2024_11_25", "20241125"), ("1e3", "1000.0")])
def test_a_name_that_reads_as_a_number_is_to_be_quoted_as_it_was_typed(text, value) -> None:
    with pytest.raises(ConfigError) as error:
        LazyConfig.apply_overrides(example(), [f"train.device={text}"])
    assert "put a text in quotes: \"train.device='...'\"" in str(error.value)
    assert f"'{value}'" not in str(error.value)
    cfg = LazyConfig.apply_overrides(example(), [f"train.device='{text}'"])
    assert cfg.train.device == text


def test_empty_dict_for_one_with_keys_is_refused_because_it_would_change_nothing() -> None:
    with pytest.raises(ConfigError, match=r"~a\.x"):
        LazyConfig.apply_overrides(DictConfig({"a": {"x": 1}}), ["a={}"])


def test_unset_value_inside_a_dict_does_not_hide_its_type() -> None:
    with pytest.raises(ConfigError, match="train takes a dict"):
        LazyConfig.apply_overrides(example(), ["train=3"])


@pytest.mark.parametrize("token", ["train.seed=7", "+train.x=1", "~train", "train.seed=text"])
def test_the_config_itself_is_never_changed(token: str) -> None:
    cfg = example()
    before = copy.deepcopy(cfg)
    with contextlib.suppress(ConfigError):
        LazyConfig.apply_overrides(cfg, [token, "optimizer.lr=3"])
    assert cfg == before


NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.one_of(st.integers(-9, 9), st.floats(-9, 9).map(lambda number: round(number, 3)))
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        st.one_of(st.booleans(), NUMBERS, st.sampled_from(["x", "yy"]), st.none()),
        lambda inner: st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
LEAVES = {"true": True, "3": 3, "2.5": 2.5, "word": "word", "null": None}


def model_set(tree: Any, parts: list[str], prefix: str, value: Any) -> bool:
    """Reference for `prefix key=value` on plain dicts; False means that it must be refused."""
    *outer, last = parts
    for part in outer:
        if part not in tree and prefix:
            tree[part] = {}
        if not isinstance(tree.get(part), dict):
            return False
        tree = tree[part]
    if last in tree:
        old = tree[last]
        if prefix == "+" or (isinstance(old, dict) and value is not None):
            return False
        if type(old) is float and type(value) is int:
            value = float(value)
        if None not in (old, value) and type(old) is not type(value):
            return False
    elif not prefix:
        return False
    tree[last] = value
    return True


@pytest.mark.parametrize(
    "token",
    [
        f"+a{'.k' * 300}=1",
        f"+a={'{k: ' * 300}1{'}' * 300}",
        f"a={'[' * 3000}{']' * 3000}",
        f"{'k.' * 60}k=1",
    ],
)
def test_an_override_nested_deeper_than_any_config_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="nested deeper than 50 levels"):
        LazyConfig.apply_overrides(to_node({"a": None}), [token])


@settings(max_examples=200, deadline=None)
@given(
    tree=TREES,
    parts=st.lists(NAMES, min_size=1, max_size=3),
    prefix=st.sampled_from(["", "+"]),
    text=st.sampled_from(sorted(LEAVES)),
)
def test_overrides_agree_with_a_model_on_plain_dicts(
    tree: dict[str, Any], parts: list[str], prefix: str, text: str
) -> None:
    expected = copy.deepcopy(tree)
    token = f"{prefix}{'.'.join(parts)}={text}"
    if model_set(expected, parts, prefix, LEAVES[text]):
        changed = resolved(LazyConfig.apply_overrides(to_node(tree), [token]))
        assert changed == expected and repr(changed) == repr(expected)
    else:
        with pytest.raises(ConfigError):
            LazyConfig.apply_overrides(to_node(tree), [token])
